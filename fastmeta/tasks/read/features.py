"""What turns the columns of a table into numbers: found on the rows that train, and the same for all others."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmeta.tasks.read._columns import Columns

_SHOWN = 8  # columns that a message names


@dataclass(frozen=True)
class Features:
    """Columns, what fills what is missing in them, and how they are shifted and scaled.

    Attributes:
        numeric: columns of numbers, in order.
        one_hot: columns of text, and the values that each has a number for; another value gives zeros.
        indicators: numeric columns beside which stands another that is 1 where a cell is missing.
        mean, scale: of each numeric column: a cell `x` becomes `(x - mean) / scale`, a missing one 0. `shift` False:
            `x` stays, and a missing one becomes `mean`.
        shift: whether columns are standardised.
    """

    numeric: tuple[str, ...]
    one_hot: tuple[tuple[str, tuple[str, ...]], ...] = ()
    indicators: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    shift: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of the D columns that come out."""
        missing = [f"{name} is missing" for name in self.indicators]
        return (*self.numeric, *missing, *(f"{name}={value}" for name, found in self.one_hot for value in found))

    def raw(self, columns: Columns) -> Tensor:
        """float64 `[R, len(numeric)]`, NaN where a cell is missing."""
        found = [torch.tensor(columns.numbers(name), dtype=torch.float64) for name in self.numeric]
        return torch.stack(found, 1) if found else torch.empty(len(columns), 0, dtype=torch.float64)

    def missing(self, columns: Columns, raw: Tensor) -> str:
        """How many cells of `raw` are missing, by column, in words; nothing if none is."""
        blank = raw.isnan()
        if not blank.any():
            return ""
        short = [(name, count) for name, count in zip(self.numeric, blank.sum(0).tolist(), strict=True) if count]
        shown = ", ".join(f"{count:,} in {name!r}" for name, count in short[:_SHOWN])
        more = f" and more in {len(short) - _SHOWN} others" if len(short) > _SHOWN else ""
        return f"{columns.path}: {int(blank.sum()):,} cells are missing, {shown}{more}"

    def fit(self, raw: Tensor) -> Features:
        """With mean and scale of the rows `raw` that train. A column that is constant there keeps its scale; one
        without any number there, or with numbers too large for a variance, raises ValueError."""
        there = ~raw.isnan()
        count = there.sum(0)
        for name, number in zip(self.numeric, count.tolist(), strict=True):
            if not number:
                raise ValueError(f"column {name!r} has no number in the rows that train: leave it out of the features")
        mean = raw.nansum(0) / count
        scale = ((raw - mean).square().nansum(0) / count).sqrt()
        for name, number in zip(self.numeric, scale.tolist(), strict=True):
            if not math.isfinite(number):
                raise ValueError(f"column {name!r} has numbers that are too large for a variance: leave it out")
        scale = torch.where(scale > 1e-12 * mean.abs().clamp_min(1e-300), scale, torch.ones_like(scale))
        return dataclasses.replace(self, mean=tuple(mean.tolist()), scale=tuple(scale.tolist()))

    def __call__(self, columns: Columns, raw: Tensor | None = None) -> Tensor:
        """float32 `[R, D]` of the cells. ValueError for one that is too large for that, by row."""
        raw = self.raw(columns) if raw is None else raw
        missing, mean = raw.isnan(), torch.tensor(self.mean, dtype=torch.float64)
        filled = torch.where(missing, mean, raw)
        if self.shift:
            filled = (filled - mean) / torch.tensor(self.scale, dtype=torch.float64)
        too_large = ~filled.float().isfinite()
        if too_large.any():
            row, column = too_large.nonzero()[0].tolist()
            raise ValueError(f"{columns.where(row, self.numeric[column])}: too large for a float32")
        parts = [filled, missing[:, [self.numeric.index(name) for name in self.indicators]]]
        for name, found in self.one_hot:
            number = {value: i for i, value in enumerate(found)}
            index = torch.tensor([number.get(text, len(found)) for text in columns.texts(name)])
            parts.append(torch.nn.functional.one_hot(index, len(found) + 1)[:, :-1])
        return torch.cat([part.float() for part in parts], 1)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Features:
        """The inverse of `as_json`."""
        one_hot = tuple((name, tuple(found)) for name, found in stored["one_hot"])
        lists = {name: tuple(stored[name]) for name in ("numeric", "indicators", "mean", "scale")}
        return cls(**lists, one_hot=one_hot, shift=stored["shift"])
