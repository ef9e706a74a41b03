"""Prototypes, neighbours and small functions of features."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from fastmeta.functional import pairwise_distance


def compute_prototypes(support_features: Tensor, support_labels: Tensor) -> Tensor:
    """The mean features of each class: features `[S, ...]` and labels `[S]` -> `[C, ...]`.

    C is how many different labels there are, and row `c` is the mean of those with label `c`: labels should be those
    from 0 to C - 1. One of these without examples has NaN, and those from C on have no row.
    """
    classes = len(support_labels.unique())
    known = (support_labels >= 0) & (support_labels < classes)
    rows = support_labels.where(known, classes).long()
    sums = support_features.new_zeros(classes + 1, *support_features.shape[1:]).index_add(0, rows, support_features)
    counts = rows.bincount(minlength=classes + 1).to(sums.dtype)
    return (sums / counts.reshape(-1, *[1] * (sums.dim() - 1)))[:classes]


def distances(rows: Tensor, others: Tensor) -> Tensor:
    """Euclidean distances of all pairs, `[N, D]` and `[M, D]` -> `[N, M]`; where both are equal, 0 with gradient 0."""
    if rows.dim() != 2 or others.dim() != 2 or rows.dtype != others.dtype:
        return torch.cdist(rows, others)  # says what is wrong, or knows what to do
    return pairwise_distance(rows.unsqueeze(0), others.unsqueeze(0), "euclidean").squeeze(0)


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the predictions, `[N, C]` -> scalar."""
    probabilities = logits.softmax(dim=1)
    return -(probabilities * (probabilities + 1e-12).log()).sum(dim=1).mean()


def k_nearest_neighbours(features: Tensor, k: int, p_norm: int = 2) -> Tensor:
    """The k - 1 rows nearest to each row, itself left out: `[N, D]` -> indices `[N, k - 1]`.

    The nearest of the k nearest is taken for the row itself.
    """
    return torch.cdist(features, features, p_norm).topk(k, largest=False).indices[:, 1:]


def power_transform(features: Tensor, power_factor: float) -> Tensor:
    """`(relu(features) + 1e-6) ** power_factor`."""
    return (features.relu() + 1e-6).pow(power_factor)


def strip_prefix(state_dict: Mapping[str, Tensor], prefix: str) -> OrderedDict[str, Tensor]:
    """A state dict whose names have lost `prefix`, where they had it."""
    return OrderedDict((name.removeprefix(prefix), value) for name, value in state_dict.items())
