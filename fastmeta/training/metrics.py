"""Means with their uncertainty, and running means that never wait for the device."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..values import dtype_of, on_device, tensor


class Estimate(NamedTuple):
    """A mean over episodes with the half width of its 95% confidence interval, `1.96 s / sqrt(n)`."""

    mean: float
    ci95: float
    count: int

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """Of one value per episode, `[n]`. One episode has an interval of NaN: it says nothing about the
        spread."""
        tensor("values", values)
        if not values.is_floating_point():
            raise TypeError(f"values must be floating, got {dtype_of(values)}")
        on_device("values", values)
        if values.dim() != 1 or values.numel() == 0:
            raise ValueError(f"values must be [n] with n >= 1, got shape {tuple(values.shape)}")
        # One copy to the host; in float64, where a mean over many episodes loses nothing.
        values = values.detach().to("cpu", torch.float64)
        n = values.numel()
        spread = float(values.std()) if n > 1 else math.nan
        return cls(float(values.mean()), 1.96 * spread / math.sqrt(n), n)

    def percent(self) -> str:
        return f"{100 * self.mean:.2f} ± {100 * self.ci95:.2f}%"

    def plain(self) -> str:
        return f"{self.mean:.4g} ± {self.ci95:.2g}"

    def as_json(self) -> dict:
        """`{"mean", "ci95", "episodes"}`; JSON has no NaN, so what is not finite becomes None."""
        return {"mean": finite_or_none(self.mean), "ci95": finite_or_none(self.ci95), "episodes": self.count}


class RunningMean:
    """The mean of numbers, and of scalars that are added on their device; reading it is the only wait."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._count = 0

    def add(self, value: Tensor | float) -> None:
        self._sum = self._sum + (value.detach() if isinstance(value, Tensor) else value)
        self._count += 1

    def read(self) -> float | None:
        """The mean since the last read, None if nothing was added."""
        if not self._count:
            return None
        mean = float(self._sum) / self._count
        self._sum, self._count = 0.0, 0
        return mean


class CalibrationError:
    """Expected calibration error: how far confidence is from accuracy (Guo et al. 2017, "On Calibration of Modern
    Neural Networks", eq. 5), over all queries that were added.

    Queries are put into `bins` equal bins by the largest probability that their softmax gives; the error is the mean,
    weighted by queries, of |accuracy - mean confidence| of a bin: 0 is perfect, 1 the worst. It stays on the device
    until it is read.
    """

    def __init__(self, bins: int = 15) -> None:
        self.bins = bins
        self.sums = torch.zeros(3, bins, dtype=torch.float64)  # queries, confidence, hits

    def add(
        self, logits: Tensor, labels: Tensor, mask: Tensor | None = None, classes: Tensor | None = None
    ) -> None:
        """Of logits `[T, Q, N]` and labels int64 `[T, Q]`; of the rows in `mask` `[T, Q]`, all without one. A label
        that is no class is not counted. classes: int64 `[T, N]`, what the columns stand for, as in `MetaOutput`."""
        confidence, predicted = logits.detach().double().softmax(-1).max(-1)
        predicted = predicted if classes is None else classes.gather(1, predicted)
        counted = (labels >= 0) & (labels < logits.shape[-1]) if classes is None else torch.ones_like(labels).bool()
        if mask is not None:
            counted = counted & mask.view(*mask.shape, *(1 for _ in labels.shape[2:]))
        hits = ((predicted == labels) & counted).double().flatten()
        confidence, counted = confidence.flatten(), counted.double().flatten()
        # bins open to the left: a confidence of 1 belongs to the last
        bin = (confidence * self.bins).ceil().long().clamp(1, self.bins) - 1
        sums = confidence.new_zeros(3, self.bins)
        sums.index_add_(1, bin, torch.stack([counted, counted * confidence, hits]))
        self.sums = self.sums.to(sums.device) + sums

    def read(self) -> float | None:
        """The error, None if nothing was added."""
        count, confidence, hits = self.sums
        if not float(count.sum()):
            return None
        return float((hits - confidence).abs().sum() / count.sum())


def finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
