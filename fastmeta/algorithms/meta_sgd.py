"""Meta-SGD: learn where to start, and how far and in which direction every single weight steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastmeta import values

from ..engines import Rates
from ._arguments import check_number
from ._inner_lr import as_rule
from ._lazy import check_initialised
from ._rated_loop import LearnedRates


class MetaSGD(LearnedRates):
    """Meta-SGD (Li, Zhou, Chen, Li 2017, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", equation 2
    and algorithm 1).

    Every task's weights step by `theta' = theta - alpha * grad L_support(theta)`, where `alpha` holds one rate per
    element of `theta`. The outer loop trains both on the query loss, second derivatives included. Nothing keeps a rate
    positive: its sign is part of the direction. Departures: the mean over tasks, where the paper sums; more than one
    inner step if asked for, all with the same rates; the paper's one.

    `rates` holds the rates, a parameter for each of the model's, with `/` for `.` in its name; an optimiser over
    `parameters()` trains them too. Those of a frozen parameter are neither used nor trained until it is unfrozen. A
    saved state that has none of a frozen parameter loads all the same.

    Args:
        model: any module from examples `[B, ...]` to predictions `[B, C]`. Parameters with `requires_grad=False` are
            neither adapted nor trained.
        initial_rates: the rates start uniform in this range, the paper's `(0.005, 0.1)` by default.
        inner_steps: `K >= 0`, 1 by default as in the paper. May be set anew between calls.
        momentum, weight_decay, clip_norm, clip_value: of the inner steps, as in `MAML`.
        first_order: drop the second derivatives; the rates' own gradient stays.
        loss: as in `MAML`.
        task_chunk: at most this many tasks at a time, to bound memory; as in `MAML`.
        memory, every: `"sweep"` finds the gradient without a graph over the steps, `"auto"` (default) where that would
            be large; as in `MAML`.

    Multi-layer perceptrons run in the fused inner loops, other modules under `torch.func`.

    Raises:
        TypeError, ValueError: arguments out of range; inputs and targets that do not fit together.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        initial_rates: tuple[float, float] = (0.005, 0.1),
        inner_steps: int = 1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        first_order: bool = False,
        loss: str | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
        task_chunk: int | str | None = None,
        memory: str = "auto",
        every: int = 1,
    ):
        check_initialised(values.module("model", model), "MetaSGD")
        super().__init__(
            model, inner_steps=inner_steps, loss=loss, first_order=first_order, task_chunk=task_chunk, memory=memory,
            every=every,
        )  # fmt: skip
        self.rule = as_rule(momentum, weight_decay, clip_norm, clip_value)
        if not isinstance(initial_rates, (tuple, list)) or len(initial_rates) != 2:
            raise TypeError(f"initial_rates must be a pair (low, high), got {initial_rates!r}")
        low, high = (check_number("initial_rates", rate) for rate in initial_rates)
        if low > high:
            raise ValueError(f"initial_rates must be a range, got {low} to {high}")
        self.rates = nn.ParameterDict(
            {
                self._key(name): nn.Parameter(torch.empty_like(p).uniform_(low, high))
                for name, p in model.named_parameters()
            }
        )

    def _rates(self, support_x: Tensor) -> Rates:
        return {n: self.rates[self._key(n)].unsqueeze(0) for n, p in self.model.named_parameters() if p.requires_grad}

    @staticmethod
    def _key(name: str) -> str:
        return name.replace(".", "/")
