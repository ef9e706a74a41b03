"""`fastmeta predict`: a learner adapts to a support set of yours and says what your queries are."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..estimators import Adapted, learner_of
from ..estimators.rules import RULES
from ..tasks import Inputs
from ..tasks.read import Columns, DataWarning, Features, folder, is_missing, picture_suffixes, pictures, read_columns
from ..training.checkpoint import write_whole


@dataclass(frozen=True)
class Predictions:
    """Rows `[n]` by name, and of each its class and the probability of every class, or its numbers.

    `key` is the column of the names, "file" or "row"; `columns` are those of `values` `[n, C]`.
    """

    key: str
    names: Sequence[str]
    columns: Sequence[str]
    values: Tensor
    classes: bool

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Header and lines of a CSV file."""
        if not self.classes:
            lines = [[name, *row] for name, row in zip(self.names, self.values.tolist(), strict=True)]
            several = len(self.columns) > 1
            return [self.key, *(f"prediction {name}" if several else "prediction" for name in self.columns)], lines
        taken = {self.key, "prediction"}
        header = [self.key, "prediction"]
        for name in self.columns:
            while name in taken:  # a class may be called as one of the first two, or as what another became
                name = f"class {name}"
            taken.add(name)
            header.append(name)
        best = [self.columns[i] for i in self.values.argmax(1).tolist()]
        lines = [[*pair, *row] for *pair, row in zip(self.names, best, self.values.tolist(), strict=True)]
        return header, lines

    def as_json(self) -> list[dict[str, Any]]:
        """One object for each row."""
        found = []
        for name, row in zip(self.names, self.values.tolist(), strict=True):
            numbers = {c: v if math.isfinite(v) else None for c, v in zip(self.columns, row, strict=True)}
            if self.classes:
                found.append({self.key: name, "prediction": max(numbers, key=numbers.get), "probabilities": numbers})
            else:
                found.append({self.key: name, "prediction": numbers if len(row) > 1 else numbers[self.columns[0]]})
        return found


def predict(
    run: str,
    support: Path,
    query: Path,
    *,
    calibrate: bool = False,
    device: str | None = None,
    on_error: str = "refuse",
    image_size: int | None = None,
    grey: bool | None = None,
    label: str | None = None,
    target: Sequence[str] = (),
) -> tuple[Predictions, dict[str, Any]]:
    """What the learner says of the queries, and what there is to tell of how: classes, rows, the temperature, and where
    the queries lie in folders named after the classes too, or their table has the column of the label, how many of them
    are right.

    Args:
        run: a run's folder or checkpoint, or the name of a rule without training (`~fastmeta.FewShotClassifier`).
        support: a folder or zip archive of pictures by class, or a table.
        query: the same; pictures may lie anywhere in it.
        calibrate: as of `~fastmeta.FewShotClassifier`.
        device: as of it.
        on_error: of pictures that cannot be decoded: "refuse" all or "skip" them.
        image_size, grey: of pictures, where a rule predicts; 84 and RGB by default. A run has its own.
        label, target: columns of a table, where a rule predicts. A run has its own.

    Raises:
        ValueError: data that the run does not read, by name.
    """
    tables = [_is_table(path) for path in (support, query)]
    if tables[0] != tables[1]:
        raise ValueError(f"--support and --query must both be pictures or both be tables, got {support} and {query}")
    given = {"--image-size": image_size, "--grey": grey, "--label": label, "--target": target or None}
    given = [name for name, value in given.items() if value is not None]
    if run in RULES["classification"] or run in RULES["regression"]:
        learner = learner_of(run, "regression" if target else "classification", device)
        inputs = None
    else:
        learner = _trained(run, device)
        inputs = learner.inputs
        if given and not (inputs.table is None and tables[0]):
            raise ValueError(f"{', '.join(given)}: {run} has its own, from training: leave {' and '.join(given)} out")
        if tables[0] and inputs.images:
            raise ValueError(f"{run} reads pictures, of shape {list(inputs.input_shape)}; {support} is a table")
    if tables[0]:
        return _of_tables(learner, inputs, support, query, calibrate=calibrate, label=label, target=tuple(target))
    options = {"image_size": image_size or 84, "grey": bool(grey), "on_error": on_error}
    if inputs is not None:
        if not inputs.images or inputs.input_shape[1] != inputs.input_shape[2]:
            raise ValueError(f"{run} reads rows of shape {list(inputs.input_shape)}, not pictures: give tables")
        channels, side, _ = inputs.input_shape
        options |= {"image_size": side, "grey": channels == 1, "background": inputs.background}
    return _of_pictures(learner, support, query, calibrate, options)


def _is_table(path: Path) -> bool:
    """Whether it is a file that is neither a picture nor an archive of pictures."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    return path.is_file() and path.suffix.lower() not in {".zip", *picture_suffixes()}


def _trained(run: str, device: str | None) -> nn.Module:
    from ..training import load

    if not os.path.exists(run):
        names = ", ".join(RULES["classification"])
        raise ValueError(f"{run}: no such file or folder, and no rule: these are {names}")
    return load(run, device=device or "auto")


def _of_pictures(
    learner: nn.Module, support: Path, query: Path, calibrate: bool, options: dict[str, Any]
) -> tuple[Predictions, dict[str, Any]]:
    examples = folder(support, cache=False, **options)
    rows, names = pictures(query, **options)
    adapted = Adapted(learner, examples.rows, examples.labels, calibrate=calibrate)
    found = Predictions("file", names, examples.names, adapted.probabilities(rows), classes=True)
    about = _about(examples.names, len(examples.rows), len(rows), adapted)
    return found, about | _accuracy(found, [name.rpartition("/")[0] for name in names])


def _accuracy(found: Predictions, told: Sequence[str | None]) -> dict[str, float]:
    """How many rows are right, where it is told of all of which class they are."""
    if not set(told) <= set(found.columns):
        return {}
    best = found.values.argmax(1).tolist()
    return {"accuracy": sum(found.columns[i] == one for i, one in zip(best, told, strict=True)) / len(told)}


def _of_tables(
    learner: nn.Module,
    inputs: Inputs | None,
    support: Path,
    query: Path,
    *,
    calibrate: bool,
    label: str | None,
    target: tuple[str, ...],
) -> tuple[Predictions, dict[str, Any]]:
    columns, asked = read_columns(support), read_columns(query)
    if inputs is not None and inputs.table is not None:
        features, label = Features.from_json(inputs.table["features"]), inputs.table["label"]
        target = tuple(inputs.table["targets"]["numeric"]) if inputs.kind == "regression" else ()
        # what these features make of cells, missing ones too, is standardised already
        learner.inputs = dataclasses.replace(inputs, table={**inputs.table, "features": None})
    elif not label and not target:
        raise ValueError("--label or --target is needed: the column of the support table that says what a row is")
    else:
        features = _all_numbers(columns, (label, *target), standardise=inputs is None)
    told = target or (label,)
    _all_there(columns, told, numbers=bool(target))
    rows, query_rows = (_numbers(features, part) for part in (columns, asked))
    if target and calibrate:
        raise ValueError("--calibrate is of probabilities, and numbers are predicted here: leave it out")
    if target:
        y = torch.tensor([columns.numbers(name) for name in target], dtype=torch.float64).T
        adapted = Adapted(learner, rows, y)
        found = Predictions("row", asked.lines, target, adapted.predict(query_rows), classes=False)
        return found, _about(None, len(columns), len(asked), adapted)
    texts = columns.names(label)
    classes = sorted(set(texts))
    adapted = Adapted(learner, rows, torch.tensor([classes.index(text) for text in texts]), calibrate=calibrate)
    found = Predictions("row", asked.lines, classes, adapted.probabilities(query_rows), classes=True)
    about = _about(classes, len(columns), len(asked), adapted)
    return found, about | (_accuracy(found, asked.names(label)) if label in asked.cells else {})


def _all_numbers(columns: Columns, told: Sequence[str | None], standardise: bool) -> Features:
    """All other columns of numbers, standardised by the support rows where a rule reads them."""
    numeric = tuple(name for name in columns.cells if name not in told and columns.is_numeric(name))
    if not numeric:
        raise ValueError(f"{columns.path} has no column of numbers to tell {', '.join(filter(None, told))} from")
    features = Features(numeric, shift=standardise)
    return features.fit(features.raw(columns))


def _numbers(features: Features, columns: Columns) -> Tensor:
    raw = features.raw(columns)
    missing = features.missing(columns, raw)
    if missing:
        warnings.warn(f"{missing}; filled with the column's mean", DataWarning, stacklevel=2)
    return features(columns, raw)


def _all_there(columns: Columns, names: Sequence[str], numbers: bool) -> None:
    columns.check(*names)
    for name in names:
        for row, cell in enumerate(columns.cells[name]):
            if is_missing(cell) if numbers else cell is None:
                raise ValueError(f"{columns.where(row, name)}: empty, and a support row must say what it is")


def _about(classes: Sequence[str] | None, support: int, query: int, adapted: Adapted) -> dict[str, Any]:
    return {
        **({} if classes is None else {"classes": list(classes)}),
        "support_rows": support, "query_rows": query, "temperature": adapted.temperature,
    }  # fmt: skip


def write(path: Path, predictions: Predictions) -> None:
    """All of it or nothing, as CSV."""
    text = io.StringIO(newline="")
    header, lines = predictions.table()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    digits = 6 if predictions.classes else 9  # of a probability, and of a float32
    writer.writerows([[f"{v:.{digits}g}" if isinstance(v, float) else v for v in line] for line in lines])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.getvalue().encode(errors="surrogateescape"))  # names of files may be no text
