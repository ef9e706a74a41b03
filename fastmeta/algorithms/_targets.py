"""Labels and targets of whole task batches: checks, one-hot codes, losses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmeta.functional import checks

from .output import over_rows


def cross_entropy(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """The tasks' losses `[T]` of logits `[T, B, N]` and labels `[T, B]`; of the rows in `mask` `[T, B]`."""
    return over_rows(F.cross_entropy(logits.transpose(1, 2), labels, reduction="none"), mask)


def check_targets(name: str, targets: Tensor, like: Tensor) -> None:
    """`targets` are floating, `[T, B, O]`, one row for each row of `like`."""
    checks.tensor(name, targets, "[T, B, O]")
    if targets.shape[:2] != like.shape[:2]:
        raise ValueError(
            f"{name} must begin with the tasks and examples [T, B] = {list(like.shape[:2])}, got {list(targets.shape)}"
        )


def one_hot(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """`[T, B, N]` of 0 and 1; a label outside [0, N) gives a row of zeros."""
    return (labels.unsqueeze(-1) == torch.arange(num_classes, device=labels.device)).to(dtype)
