"""One workload of the suite."""

from __future__ import annotations

from dataclasses import dataclass, field

from .measure import Contender


@dataclass(frozen=True)
class Case:
    """One workload: `bars` gives for each peer the ratio of medians (peer over ours) to reach."""

    name: str
    contenders: dict[str, Contender]
    flops: float  # the least that an exact answer takes (benchmarks/counts.py)
    bytes: float
    bars: dict[str, float] = field(default_factory=dict)
    # other work in the same run, not compared for equal results, and how often its time ours may be at most
    yardsticks: dict[str, Contender] = field(default_factory=dict)
    at_most: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)  # who is known not to be fit for this, and why
    rtol: float = 0.0  # between contenders, where that of the dtype is too strict
    quick: bool = True  # whether `--quick` has it
    # for plots of how time grows: the curve's name, what grows ("tasks", "inner steps", "rows") and how much there is
    point: tuple[str, str, int] | None = None
