"""Learners with norms that take their statistics from the rows at hand, as `conv4` in MAML.

What such a learner says of a query depends on the queries beside it, and of few of them, or of many of one class, it is
often wrong. So here each query stands beside the support set alone: its prediction depends on nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def by_rows_at_hand(learner: nn.Module) -> bool:
    """Whether the learner in eval mode has batch norms without running statistics."""
    norms = [m for m in learner.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return any(norm.running_mean is None for norm in norms)


def one_query_each(learner: nn.Module, state: Any, support: Tensor, query: Tensor) -> Tensor:
    """Predictions `[T, C]` for one query of each task, `[T, ...]`, beside its support set `[T, S, ...]`."""
    return learner.predict(state, torch.cat([support, query.unsqueeze(1)], 1))[:, -1]


def beside_support(learner: nn.Module, state: Any, support: Tensor, rows: Tensor) -> Tensor:
    """Predictions `[n, C]` of one task's queries `[n, ...]`, each beside the support set `[S, ...]`."""
    if not hasattr(state, "of_tasks"):  # a state that cannot be repeated
        return torch.cat([one_query_each(learner, state, support[None], row[None]) for row in rows])
    repeated = state.of_tasks(torch.zeros(len(rows), dtype=torch.int64, device=rows.device))
    return one_query_each(learner, repeated, support.expand(len(rows), *support.shape), rows)
