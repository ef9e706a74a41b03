"""A temperature for probabilities, from what a learner says of support rows that it was not shown."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .batch_norms import by_rows_at_hand, one_query_each

_MOST = 128  # support rows that are left out in turn
_RANGE = 1e-3, 1e3  # of the temperature


def left_out_logits(learner: nn.Module, rows: Tensor, labels: Tensor, at_once: int) -> tuple[Tensor, Tensor]:
    """Logits `[M, N]` of support rows `[S, ...]`, each from the others, and their labels `[M]`: as many tasks, some at
    a time so that these hold no more than `at_once` rows. Of more than 128 rows as many are left out, evenly spread."""
    size = len(rows)
    left_out = torch.arange(size, device=rows.device)
    if size > _MOST:
        left_out = left_out[torch.linspace(0, size - 1, _MOST, device=rows.device).long()]
    kept = torch.arange(size - 1, device=rows.device)
    found = []
    for queries in left_out.split(max(1, at_once // size)):
        others = kept + (kept >= queries.unsqueeze(1))  # [t, S - 1]
        state = learner.adapt(rows[others], labels[others])
        if by_rows_at_hand(learner):
            logits = one_query_each(learner, state, rows[others], rows[queries])
        else:
            logits = learner.predict(state, rows[queries].unsqueeze(1))[:, 0]
        found.append(logits.double())
    return torch.cat(found), labels[left_out]


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The `t` for which `softmax(logits / t)` fits the labels best: a convex problem in `1 / t`, by bisection.

    The targets are those of Platt 1999 for N classes, `(M + 1) / (M + N)` for the right one: few rows that are all
    right are no proof of certainty.
    """
    size, classes = logits.shape
    logits = logits.clamp_min(-1e4)  # the logarithm of a probability that underflowed
    targets = torch.full_like(logits, 1 / (size + classes))
    targets.scatter_(1, labels.unsqueeze(1), (size + 1) / (size + classes))
    low, high = _RANGE
    for _ in range(60):
        middle = (low * high) ** 0.5
        slope = ((torch.softmax(logits / middle, 1) - targets) * logits).sum()  # of the loss, in 1 / t
        low, high = (middle, high) if slope > 0 else (low, middle)
    return high
