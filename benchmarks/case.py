"""One workload of the suite."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.measure import Contender


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
