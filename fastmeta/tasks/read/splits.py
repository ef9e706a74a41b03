"""Which classes, or tasks, train, which validate and which test."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from fastmeta import values
from fastmeta.tasks.examples import Examples
from fastmeta.tasks.read._columns import read_columns
from fastmeta.tasks.task_rows import TaskRows

SPLITS = ("train", "val", "test")
# what others call them
_ALSO = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}
Part = TypeVar("Part", Examples, TaskRows)


class Splits(NamedTuple):
    """Examples, or rows by task, of which no class or task is in two; None for a split with none."""

    train: Examples | TaskRows | None
    val: Examples | TaskRows | None
    test: Examples | TaskRows | None


def split_examples(
    examples: Part,
    fractions: Sequence[float] = (0.64, 0.16, 0.2),
    *,
    names: Mapping[str, Iterable[str]] | None = None,
    seed: int = 0,
    by_group: bool = False,
) -> Splits:
    """The classes of `examples`, or the tasks of `TaskRows`, in three parts. Rows are not copied.

    Args:
        fractions: of the classes, for training, validation and test; a part with any gets one class at least.
        names: in place of fractions the classes' names of each split, by "train", "val" and "test". Of a class
            `super/class` the last part is enough where it is the only one of that name. Classes that are in no list are
            left out.
        seed: of the order in which fractions take the classes; the same on every machine.
        by_group: keep super-classes together, as tieredImageNet does: fractions are then met as nearly as they can be.

    Raises:
        ValueError: names that are not there or in two splits, fractions that are none, fewer classes than parts;
            `by_group` without groups.
    """
    if names is not None:
        return _by_names(examples, names)
    fractions = _fractions(fractions)
    values.seed("seed", seed)
    groups = examples.groups if values.flag("by_group", by_group) else examples.names
    if groups is None:
        raise ValueError(f"by_group needs super-classes, and {examples.name} has none")
    found = sorted(set(groups))
    parts = sum(fraction > 0 for fraction in fractions)
    if len(found) < parts:
        what = "super-classes" if by_group else "classes or tasks"
        raise ValueError(f"{examples.name} has {len(found)} {what}, too few for {parts} splits")
    sizes = {group: groups.count(group) for group in found} if by_group else dict.fromkeys(found, 1)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    part_of = _dealt([found[i] for i in order], sizes, fractions)
    return _parts(examples, [part_of[group] for group in groups])


def names_in_files(folder: str | PathLike) -> dict[str, list[str]]:
    """The lists `train.txt`, `val.txt` and `test.txt` of a folder, a class in a line, for `split_examples`."""
    found = {}
    for split in SPLITS:
        path = Path(folder) / f"{split}.txt"
        try:
            found[split] = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file; train.txt, val.txt and test.txt name the classes") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text in UTF-8: {error}") from error
    return found


def names_in_table(path: str | PathLike, column: str = "split", classes: str = "class") -> dict[str, list[str]]:
    """The splits that a table's `column` gives to the names in its column `classes`, for `split_examples`.
    A CSV file has commas, semicolons, tabs or bars between its cells.

    Raises:
        ValueError: no table, a column that is not there, a word that is no split, a class with two; by row.
    """
    columns = read_columns(Path(path))
    columns.check(column, classes)
    found: dict[str, tuple[str, int]] = {}
    for i, (name, word) in enumerate(zip(columns.names(classes), columns.names(column), strict=True)):
        split = split_name(word, columns.where(i, column))
        if name is None:
            raise ValueError(f"{columns.where(i, classes)}: empty")
        before, row = found.setdefault(name, (split, columns.lines[i]))
        if before != split:
            raise ValueError(f"{columns.where(i, column)}: {name!r} is in {split} here, and in {before} in row {row}")
    return {split: [name for name, (of, _) in found.items() if of == split] for split in SPLITS}


def split_name(text: str | None, where: str) -> str:
    word = (text or "").strip().lower()
    if _ALSO.get(word, word) not in SPLITS:
        raise ValueError(f"{where}: must be one of train, val, test; got {text or ''!r}")
    return _ALSO.get(word, word)


def _fractions(fractions: Sequence[float]) -> tuple[float, ...]:
    if not isinstance(fractions, (list, tuple)) or len(fractions) != len(SPLITS):
        raise ValueError(f"fractions must be three, for train, val and test, got {fractions!r}")
    fractions = tuple(values.number("fractions", fraction, 0) for fraction in fractions)
    if not 0 < sum(fractions) < 1.001:
        raise ValueError(f"fractions must add up to at most 1, got {fractions}")
    return fractions


def _dealt(groups: Sequence[str], sizes: Mapping[str, int], fractions: Sequence[float]) -> dict[str, int]:
    """The part of each group: each goes where most is missing, and the last go where there is nothing yet."""
    missing = [fraction * sum(sizes.values()) / sum(fractions) for fraction in fractions]
    empty = {part for part, fraction in enumerate(fractions) if fraction > 0}
    found = {}
    for taken, group in enumerate(groups):
        allowed = empty if len(groups) - taken <= len(empty) else [p for p in range(len(fractions)) if fractions[p] > 0]
        part = max(allowed, key=lambda part: missing[part])
        missing[part] -= sizes[group]
        empty.discard(part)
        found[group] = part
    return found


def _by_names(examples: Part, names: Mapping[str, Iterable[str]]) -> Splits:
    for split in names:
        values.choice("names", split, SPLITS)
    short: dict[str, list[str]] = {}
    for name in examples.names:
        short.setdefault(name.rsplit("/", 1)[-1], []).append(name)
    part_of: dict[str, int] = {}
    for part, split in enumerate(SPLITS):
        for given in names.get(split, ()):
            name = str(given)
            if name not in examples.names:
                fitting = short.get(name, [])
                if len(fitting) != 1:
                    why = f"could be {' or '.join(fitting[:3])}" if fitting else f"is none of {examples.name}"
                    raise ValueError(f"the {split} split names {name!r}, which {why}")
                (name,) = fitting
            if part_of.setdefault(name, part) != part:
                raise ValueError(f"{name!r} is in two splits, {SPLITS[part_of[name]]} and {split}")
    return _parts(examples, [part_of.get(name, -1) for name in examples.names])


def _parts(examples: Part, part_of: Sequence[int]) -> Splits:
    found = []
    for part, split in enumerate(SPLITS):
        chosen = [i for i, of in enumerate(part_of) if of == part]
        found.append(examples.only(chosen, name=f"{examples.name}/{split}") if chosen else None)
    return Splits(*found)
