"""Own data by one line of text, whichever way it comes in."""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmeta import values
from fastmeta.tasks.examples import Examples
from fastmeta.tasks.read._warning import DataWarning
from fastmeta.tasks.read.arrays import array_file
from fastmeta.tasks.read.features import Features
from fastmeta.tasks.read.folder import folder, opened
from fastmeta.tasks.read.spec import FORMS, IN_A_PATH, parse
from fastmeta.tasks.read.splits import SPLITS, Splits, names_in_files, names_in_table, split_examples
from fastmeta.tasks.read.table import table
from fastmeta.tasks.task_rows import TaskRows

_HOW = {"fractions": "fractions", "split_seed": "seed", "by_group": "by_group"}


@dataclass(frozen=True)
class Data:
    """Data in three splits, whichever way it came in.

    Attributes:
        spec: the text that it was opened by.
        train, val, test: `Examples`, or `TaskRows`; None for a split with nothing in it.
        features, targets: of a table, what its numbers were made by.
    """

    spec: str
    train: Examples | TaskRows | None
    val: Examples | TaskRows | None
    test: Examples | TaskRows | None
    features: Features | None = None
    targets: Features | None = None

    @property
    def kind(self) -> str:
        """What its tasks are: "regression" or "classification"."""
        return parse(self.spec).kind

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.part().input_shape

    def digest(self) -> str:
        """Of the names of classes or tasks, and of how many rows each has, by split."""
        parts = [part and [list(part.names), part.counts.tolist()] for part in (self.train, self.val, self.test)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def part(self, split: str | None = None) -> Examples | TaskRows:
        """A split, or the first with anything in it. ValueError if it is empty."""
        if split is None:
            return next(part for part in (self.train, self.val, self.test) if part is not None)
        found = getattr(self, values.choice("split", split, SPLITS))
        if found is None:
            raise ValueError(f"{self.spec} has nothing in its {split} split")
        return found


def open_data(
    data: str, *, progress: bool = False, fitted: Features | None = None, fitted_targets: Features | None = None
) -> Data:
    """Own data by a line of text `form:path?option=value&...`, in splits by class or task.

    Forms, and what reads them:
        folder:PATH, zip:PATH: pictures, `folder`. Options image_size, grey, background, on_error, cache. Folders train,
            val and test inside are the splits; without val, a fifth of the training classes validate.
        npz:PATH, npy:PATH, safetensors:PATH: `array_file`; of npy the option labels=FILE. Floating rows become float32.
        csv:PATH, parquet:PATH: `table`. Options label, task, target, features, one_hot, ignore (several with commas
            between), missing, indicator, standardise, delimiter; split=COLUMN says which split a row is in.

    Splits of all: split_seed=0, fractions=0.64,0.16,0.2; or splits=PATH, a folder of train.txt, val.txt and test.txt,
    or a CSV file in which class=COLUMN names the class (or task) and split=COLUMN the split. A relative one lies
    beside the data: in the folder, or in that of the file. Such text files in a folder of pictures are found without
    being named. by_group=true keeps super-classes together.

    Args:
        data: the line. Paths may be relative; a `?` in one is written %3F (and a % before 3F or 25 as %25).
        progress: draw a bar where decoding takes long.
        fitted, fitted_targets: of a table, as of `table`.

    Raises:
        ValueError, ImportError: as of what reads them; an unknown form or option, with the nearest name.
    """
    spec = parse(data)
    options = dict(spec.options)
    path = Path(spec.path).expanduser()
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder" + (f". {IN_A_PATH}" if "?" in data else ""))
    if path.is_dir() and not spec.pictures:
        raise ValueError(f"{path} is a folder, and {spec.form}: takes a file; folder:PATH is for pictures by class")
    if spec.pictures and path.is_file() and path.suffix.lower() != ".zip":
        others = ", ".join(f"{form}:" for form, allowed in FORMS.items() if "image_size" not in allowed)
        raise ValueError(f"{path} is a file, and {spec.form}: takes a folder or a .zip archive; files have {others}")
    if spec.form in ("csv", "parquet"):
        split = options.pop("split", None) if "splits" not in options else None
        split = split or _split_by(options, path)
        if "delimiter" in options:
            options["delimiter"] = {"tab": "\t"}.get(options["delimiter"], options["delimiter"])
        found = table(path, split=split, fitted=fitted, fitted_targets=fitted_targets, **options)
        return Data(data, *found.splits, found.features, found.targets)
    split = _split_by(options, path)
    if spec.pictures:
        read = functools.partial(folder, path, progress=progress, **options)
        inside = _splits_inside(path)
        if inside:
            return Data(data, *_of_folders(read, inside, split))
        return Data(data, *split(read()))
    labels = options.get("labels")
    examples = array_file(path, None if labels is None else path.parent / labels)
    if examples.rows.is_floating_point():
        examples.rows = examples.rows.float()
    return Data(data, *split(examples))


def _split_by(options: dict[str, Any], path: Path) -> Callable[[Any], Splits]:
    """Takes those that say how to split out of `options`."""
    chosen = {new: options.pop(old) for old, new in _HOW.items() if old in options}
    where = options.pop("splits", None)
    columns = {key: options.pop(key) for key in ("class", "split") if key in options}
    beside = path if path.is_dir() else path.parent
    if where is None and beside == path and all((path / f"{one}.txt").is_file() for one in SPLITS):
        where = "."
    if where is None:
        if columns:
            raise ValueError(f"option {next(iter(columns))} names a column of the file that splits=FILE names")
        return functools.partial(split_examples, **chosen)
    if chosen:
        raise ValueError(f"splits={where} says which classes are in which split: leave {', '.join(chosen)} out")
    source = beside / where
    if source.is_dir():
        return functools.partial(split_examples, names=names_in_files(source))
    named = {new: columns[old] for old, new in (("split", "column"), ("class", "classes")) if old in columns}
    return functools.partial(split_examples, names=names_in_table(source, **named))


def _splits_inside(path: Path) -> list[str]:
    """The folders train, val and test inside, where there are no others."""
    with opened(path) as (files, _):
        tops = {file.parts[0] for file in files}
    return [split for split in SPLITS if split in tops] if "train" in tops and tops <= set(SPLITS) else []


def _of_folders(read: Callable[..., Examples], inside: list[str], split: functools.partial) -> Splits:
    found = {one: read(under=one) for one in inside}
    for held_out in inside[1:]:
        same = sorted(set(found[held_out].names) & set(found["train"].names))
        if same:
            warnings.warn(
                f"the folders train and {held_out} have {len(same)} classes of the same name, such as {same[0]!r}; if "
                f"they are the same class, what is found on {held_out} is no accuracy on new classes: for that put "
                "all pictures of a class into one folder, class/instance.png, without train and the like above it",
                DataWarning,
                stacklevel=3,
            )
    if "val" not in found:
        found["train"], found["val"], _ = split_examples(found["train"], (0.8, 0.2, 0), **_seeded(split.keywords))
    return Splits(*(found.get(one) for one in SPLITS))


def _seeded(keywords: Mapping[str, Any]) -> dict[str, Any]:
    return {key: keywords[key] for key in ("seed", "by_group") if key in keywords}
