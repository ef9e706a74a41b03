"""`torchopt.schedule`: rates as functions of the steps taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


def polynomial_schedule(
    init_value: float, end_value: float, power: float, transition_steps: int, transition_begin: int = 0
) -> Callable[[Any], Any]:
    """`init_value` until `transition_begin`, then to `end_value` in `transition_steps` steps, as `(1 - t) ** power`."""
    if transition_steps <= 0:
        return lambda count: init_value
    begin = max(transition_begin, 0)

    def schedule(count: Any) -> Any:
        if isinstance(count, torch.Tensor):
            done = torch.clamp(count - begin, 0, transition_steps)
        else:
            done = min(max(count - begin, 0), transition_steps)
        return (init_value - end_value) * (1.0 - done / transition_steps) ** power + end_value

    return schedule


def linear_schedule(
    init_value: float, end_value: float, transition_steps: int, transition_begin: int = 0
) -> Callable[[Any], Any]:
    """From `init_value` to `end_value` in a line."""
    return polynomial_schedule(init_value, end_value, 1, transition_steps, transition_begin)


def exponential_decay(
    init_value: float,
    decay_rate: float,
    transition_begin: int = 0,
    transition_steps: int = 1,
    staircase: bool = False,
    end_value: float | None = None,
) -> Callable[[Any], Any]:
    """`init_value * decay_rate ** (steps / transition_steps)` from `transition_begin` on, in whole powers with
    `staircase`, and not beyond `end_value`."""
    if (transition_steps is not None and transition_steps <= 0) or decay_rate == 0:
        return lambda count: init_value
    begin = max(transition_begin, 0)

    def schedule(count: Any) -> Any:
        steps = count - begin
        power = math.floor(steps / transition_steps) if staircase else steps / transition_steps
        value = init_value if steps <= 0.0 else init_value * decay_rate**power
        if end_value is not None:
            value = (max if decay_rate < 1.0 else min)(value, end_value)
        return value

    return schedule
