"""A table: classes by a column, or tasks by a column with a number or a class to tell of each row."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmeta import values
from fastmeta.tasks.examples import Examples
from fastmeta.tasks.read._columns import Columns, is_missing, read_columns
from fastmeta.tasks.read._warning import DataWarning
from fastmeta.tasks.read.features import Features
from fastmeta.tasks.read.splits import SPLITS, Splits, split_examples, split_name
from fastmeta.tasks.task_rows import TaskRows

MISSING = ("mean", "drop", "refuse")
_SHOWN = 8


class Table(NamedTuple):
    """What came of a table: its parts, and how other rows are brought to the same numbers."""

    splits: Splits
    features: Features
    targets: Features | None  # of regression: how the targets were scaled


def table(
    path: str | os.PathLike,
    *,
    label: str | None = None,
    task: str | None = None,
    target: str | Sequence[str] | None = None,
    features: Sequence[str] | None = None,
    one_hot: Sequence[str] = (),
    ignore: Sequence[str] = (),
    missing: str = "mean",
    indicator: bool = False,
    standardise: bool = True,
    split: str | Callable[[Examples | TaskRows], Splits] = split_examples,
    delimiter: str | None = None,
    fitted: Features | None = None,
    fitted_targets: Features | None = None,
) -> Table:
    """Rows of a CSV or Parquet file, in three splits.

    Args:
        path: `.parquet` needs pyarrow; any other file is text with a header, cells between commas, semicolons, tabs or
            bars.
        label: the column of the classes, each text a class as it stands, `NA` and `None` too. Alone: classification by
            class, `Examples`.
        task: the column of the tasks, with `label` (what is to be told of a row, in every task: `TaskRows` of classes)
            or with `target`.
        target: a column of numbers, or several: regression by task, `TaskRows`.
        features: the columns to tell it from; default all other columns of numbers.
        ignore: columns not to tell it from, such as another target.
        one_hot: columns of text to tell it from, each value in the rows that train a column of zeros and ones.
        missing: a feature that is empty, `?`, `NA`, `NaN`, `null` or `none`: "mean" (default) fills in the mean of the
            column, "drop" leaves the row out, "refuse" raises. The first two warn, and count. A row without label or
            task (an empty cell) or without target is dropped or refused, and refused with "mean".
        indicator: with "mean", another column that is 1 where there was none, for each column that has such cells.
        standardise: features with mean 0 and variance 1, targets too. Means and variances, those that fill cells as
            well, are of the rows that train.
        split: a column of train, val and test, or what makes splits of the whole: `split_examples`, or a partial of it.
        delimiter: between cells; default what the header has most of.
        fitted: of another table, such as that of a run, in place of `features`, `one_hot`, `indicator` and
            `standardise`: columns become what they became there.
        fitted_targets: likewise of the targets, in their order.

    Returns:
        A `Table`: splits of rows float32 `[R, D]`, targets float32 `[R, O]`.

    Raises:
        TypeError, ValueError: a cell that is no number, a missing one, a class or task in two splits: with file, row
            and column; columns that are not there; no features.
        ImportError: Parquet without pyarrow.
    """
    values.path("path", path)
    values.choice("missing", missing, MISSING)
    values.flag("indicator", indicator)
    values.flag("standardise", standardise)
    targets = () if target is None else (target,) if isinstance(target, str) else tuple(target)
    if not (label is not None) ^ bool(targets):
        raise ValueError("a table needs label (a column of classes) or target (columns of numbers), and not both")
    if targets and task is None:
        raise ValueError("target needs task: the column that says which task, such as a patient, a row is of")
    path = Path(path)
    columns = read_columns(path, delimiter)
    by_column = split if isinstance(split, str) else None
    about = [name for name in (label, task, *targets) if name is not None]
    columns.check(*about, *(features or ()), *one_hot, *ignore, *([] if by_column is None else [by_column]))
    if fitted is not None:
        numeric, one_hot, indicator = fitted.numeric, [name for name, _ in fitted.one_hot], False
    elif features is not None:
        numeric = tuple(features)
    else:
        numeric = _numeric(columns, {*about, *one_hot, *ignore, by_column})
    if not numeric and not one_hot:
        raise ValueError(f"{path} has no features: no column of numbers beside {', '.join(about)}")
    columns = _told(columns, about, targets, drop=missing == "drop")
    used, columns, raw = _filled(columns, fitted or Features(numeric, shift=standardise), missing, indicator)
    if fitted_targets is not None and fitted_targets.numeric != targets:
        raise ValueError(f"target must be {', '.join(fitted_targets.numeric)} as in the run, got {', '.join(targets)}")
    aims = fitted_targets or Features(targets, shift=standardise)
    raw_aims = aims.raw(columns)

    def whole(rows: Tensor, aimed: Tensor) -> Examples | TaskRows:
        if task is None:
            return Examples(rows, _keys(columns.names(label)), name=path.stem)
        if targets:
            return TaskRows(rows, aimed, _keys(columns.names(task)), name=path.stem)
        classes, found = np.unique(_keys(columns.names(label)), return_inverse=True)
        told = torch.from_numpy(found.astype(np.int64))
        return TaskRows(rows, told, _keys(columns.names(task)), classes=classes.tolist(), name=path.stem)

    def parts(rows: Tensor, aimed: Tensor) -> Splits:
        made = whole(rows, aimed)
        if by_column is None:
            return split(made)
        return split_examples(made, names=_by_column(columns, by_column, task or label))

    if fitted is None or (targets and fitted_targets is None):
        # who trains must be known before it is known how rows are scaled
        training = parts(torch.arange(len(columns)), raw_aims).train
        if training is None:
            raise ValueError(f"{path}: no row trains; the split needs a part for training")
        chosen = training.order if isinstance(training, Examples) else training.by_task.order
        if fitted_targets is None:
            aims = aims.fit(raw_aims[chosen])
        if fitted is None:
            trains = columns.only(chosen.tolist())
            found = tuple((name, tuple(sorted({*trains.texts(name)} - {None}))) for name in one_hot)
            used = dataclasses.replace(used, one_hot=found).fit(raw[chosen])
    return Table(parts(used(columns, raw), aims(columns, raw_aims)), used, aims if targets else None)


def _numeric(columns: Columns, others: set[str | None]) -> tuple[str, ...]:
    left = [name for name in columns.cells if name not in others]
    found = tuple(name for name in left if columns.is_numeric(name))
    texts = [name for name in left if name not in found]
    if texts:
        told = f"{columns.path}: columns of text are left out: {', '.join(texts[:_SHOWN])}; one_hot takes them"
        warnings.warn(told, DataWarning, stacklevel=3)
    return found


def _told(columns: Columns, about: Sequence[str], targets: Sequence[str], drop: bool) -> Columns:
    """Rows that have a label, a task and targets."""
    bad = {}
    for name in about:
        lacks = is_missing if name in targets else lambda cell: cell is None
        bad |= {i: name for i, cell in enumerate(columns.cells[name]) if lacks(cell)}
        odd = sorted({cell for cell in columns.cells[name] if is_missing(cell) and not lacks(cell)})
        if odd:
            told = f"{columns.path}, column {name!r}: {', '.join(map(repr, odd))} is taken for a name, as any other"
            warnings.warn(f"{told}; where a row has none, leave the cell empty", DataWarning, stacklevel=3)
    if bad and not drop:
        raise ValueError(
            f"{columns.where(min(bad), bad[min(bad)])}: empty, and in {len(bad):,} rows together; what is to be told "
            "cannot be filled in: missing 'drop' leaves such rows out"
        )
    if len(bad) == len(columns):
        raise ValueError(f"{columns.path}: no row has all of {', '.join(about)}")
    if bad:
        told = f"{columns.path}: {len(bad):,} rows without {' or '.join(about)} are dropped"
        warnings.warn(told, DataWarning, stacklevel=3)
        columns = columns.only([i for i in range(len(columns)) if i not in bad])
    return columns


def _filled(columns: Columns, features: Features, missing: str, indicator: bool) -> tuple[Features, Columns, Tensor]:
    """Features, rows and numbers when what is missing has been said, and dropped or refused where it is to be."""
    raw = features.raw(columns)
    blank = raw.isnan()
    if not blank.any():
        return features, columns, raw
    told = features.missing(columns, raw)
    if missing == "refuse":
        row, column = blank.nonzero()[0].tolist()
        raise ValueError(
            f"{columns.where(row, features.numeric[column])}: empty; {told}; missing 'mean' fills in the column's "
            "mean, 'drop' leaves the row out"
        )
    if missing == "mean":
        warnings.warn(f"{told}; filled with the mean of the rows that train", DataWarning, stacklevel=3)
        if indicator:
            short = [name for name, any_of in zip(features.numeric, blank.any(0).tolist(), strict=True) if any_of]
            features = dataclasses.replace(features, indicators=tuple(short))
        return features, columns, raw
    kept = (~blank.any(1)).nonzero().flatten().tolist()
    if not kept:
        raise ValueError(f"{told}; missing 'drop' leaves no row")
    warnings.warn(f"{told}; {len(columns) - len(kept):,} rows are dropped", DataWarning, stacklevel=3)
    return features, columns.only(kept), raw[kept]


def _by_column(columns: Columns, column: str, of: str) -> dict[str, list[str]]:
    """The names in column `of` of each split."""
    found: dict[str, tuple[str, int]] = {}
    cells = columns.cells[column]
    for i, name in enumerate(columns.names(of)):
        split = split_name(cells[i] and str(cells[i]), columns.where(i, column))
        before, row = found.setdefault(name, (split, i))
        if before != split:
            raise ValueError(
                f"{columns.where(i, column)}: {of} {name!r} is in {split} here, and in {before} in row "
                f"{columns.lines[row]}: all rows of one must be in one split"
            )
    return {split: [name for name, (of, _) in found.items() if of == split] for split in SPLITS}


def _keys(texts: Sequence[str]) -> list[str] | list[int]:
    """Numbers where all texts are whole ones, so that 2 comes before 10."""
    whole = all(text.isdecimal() and text == str(int(text)) for text in set(texts))
    return [int(text) for text in texts] if whole else list(texts)
