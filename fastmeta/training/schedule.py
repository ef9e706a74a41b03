"""The outer learning rate as a function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "halve", "cosine")


def learning_rate(
    base: float, step: int, *, schedule: str = "constant", halve_every: int = 0, total: int | None = None
) -> float:
    """The rate of step `step`, counted from 0.

    `"halve"` halves it every `halve_every` steps (Snell et al. 2017 use 2,000). `"cosine"` lets it fall along
    half a cosine to 0 at `total` steps. Raises ValueError where the schedule's own number is missing.
    """
    if schedule == "constant":
        return base
    if schedule == "halve":
        if halve_every < 1:
            raise ValueError(f"schedule 'halve' needs halve_every >= 1, got {halve_every}")
        return base * 0.5 ** (step // halve_every)
    if schedule == "cosine":
        if not total:
            raise ValueError("schedule 'cosine' needs the total number of steps")
        return base * 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))
    raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}")
