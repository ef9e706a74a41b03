"""Learners that need no training: closed rules on the rows themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..algorithms import MatchingNetwork, NearestNeighbour, RidgeHead


class RuleState(NamedTuple):
    """What `Rule.adapt` returns: the learner's state, and the means of the support rows and, in regression, of their
    targets."""

    state: Any
    mean: Tensor
    target_mean: Tensor | None


class Rule(nn.Module):
    """A learner on flattened rows less the mean of the task's support rows, in float64. In regression targets lose
    their mean likewise: ridge regression then has an intercept without a penalty."""

    def __init__(self, learner: nn.Module):
        super().__init__()
        self.learner = learner.double()

    def adapt(self, support_x: Tensor, support_y: Tensor) -> RuleState:
        """Rows `[T, S, ...]`, labels int64 `[T, S]` or targets floating `[T, S, O]`."""
        rows, mean = _centred(support_x.flatten(2).double())
        target_mean = None
        if support_y.is_floating_point():
            support_y, target_mean = _centred(support_y.double())
        return RuleState(self.learner.adapt(rows, support_y), mean, target_mean)

    def predict(self, state: RuleState, query_x: Tensor) -> Tensor:
        """Logits `[T, Q, N]` or predictions `[T, Q, O]` of rows `[T, Q, ...]`."""
        found = self.learner.predict(state.state, query_x.flatten(2).double() - state.mean)
        return found if state.target_mean is None else found + state.target_mean


def _centred(rows: Tensor) -> tuple[Tensor, Tensor]:
    mean = rows.mean(1, keepdim=True)
    return rows - mean, mean


RULES: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "classification": {
        "nearest-mean": lambda: NearestNeighbour(nn.Flatten()),
        "nearest": lambda: NearestNeighbour(nn.Flatten(), rule="nearest"),
        "ridge": lambda: RidgeHead(nn.Flatten()),
        "in-context": lambda: MatchingNetwork(nn.Flatten()),
    },
    "regression": {"ridge": lambda: RidgeHead(nn.Flatten(), loss="mse")},
}


def rule(name: str, kind: str, device: torch.device) -> Rule:
    """The rule of this name, for "classification" or "regression"."""
    return Rule(RULES[kind][name]()).to(device)
