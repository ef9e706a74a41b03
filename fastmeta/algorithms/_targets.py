"""Labels and targets of whole task batches: checks, one-hot codes, losses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmeta.dispatch.labels import label_range
from fastmeta.functional import checks


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The tasks' losses `[T]` of logits `[T, B, N]` and labels `[T, B]`."""
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


def check_labels(name: str, labels: Tensor, like: Tensor, num_classes: int) -> None:
    """`labels` are int64, one for each row of `like` `[T, B, ...]`, in [0, num_classes)."""
    checks.labels(name, labels, "[T, B]", like, "the examples")
    label_range(name, labels, num_classes)


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
