"""Prototypes and the loss on them.

In plain torch, in the order in which torchmeta adds: sums of small integers are exact, and a mean is a quotient. For
many queries or classes `fastmeta.functional.prototypical_loss` gives the same to rounding, without a tensor
`[T, C, Q, D]`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["get_num_samples", "get_prototypes", "prototypical_loss"]


def get_num_samples(targets: Tensor, num_classes: int, dtype: torch.dtype | None = None) -> Tensor:
    """How many examples of each class a task has: targets `[T, S]` int64 -> `[T, C]` in `dtype`, by default int64."""
    with torch.no_grad():
        ones = torch.ones_like(targets, dtype=dtype)
        return ones.new_zeros(targets.shape[0], num_classes).scatter_add_(1, targets, ones)


def get_prototypes(embeddings: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """The mean embedding of each class of each task.

    Args:
        embeddings: `[T, S, D]`.
        targets: `[T, S]` int64 in [0, num_classes).
        num_classes: C.

    Returns:
        `[T, C, D]`; zeros for a class without examples.
    """
    counts = get_num_samples(targets, num_classes, dtype=embeddings.dtype).clamp_(min=1).unsqueeze(-1)
    sums = embeddings.new_zeros(embeddings.shape[0], num_classes, embeddings.shape[-1])
    return sums.scatter_add(1, targets.unsqueeze(-1).expand_as(embeddings), embeddings) / counts


def prototypical_loss(prototypes: Tensor, embeddings: Tensor, targets: Tensor, **kwargs) -> Tensor:
    """Cross-entropy of minus the squared distances.

    Args:
        prototypes: `[T, C, D]`.
        embeddings: `[T, Q, D]`, of the queries.
        targets: `[T, Q]` int64 in [0, C).
        kwargs: of `torch.nn.functional.cross_entropy`.

    Returns:
        The mean over all queries of all tasks, or what `reduction` says.
    """
    squares = (prototypes.unsqueeze(2) - embeddings.unsqueeze(1)).square().sum(-1)
    return F.cross_entropy(-squares, targets, **kwargs)
