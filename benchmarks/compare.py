"""One run beside an earlier one: which rows have become slower than the spread of both explains."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

LEAST = 1.10  # times as long that are nobody's fault on a quiet machine


@dataclass(frozen=True)
class Change:
    """How a case changed: times as long as before, what the other contenders' times changed by, and what is allowed."""

    name: str
    before_ms: float
    now_ms: float
    others: float  # the machine's part
    allowed: float

    @property
    def times(self) -> float:
        """As long as before, the machine's part taken out."""
        return self.now_ms / self.before_ms / self.others

    @property
    def slower(self) -> bool:
        return self.times > self.allowed


def _spread(times: dict) -> float:
    """Between quartiles, relative to the median."""
    return (times["p75_ms"] - times["p25_ms"]) / times["median_ms"]


def compare(now: dict, before: dict) -> list[Change]:
    """The cases that both reports have, those that slowed down most first.

    A shared machine is not as fast today as it was: what changed for every other contender of the same case, whose code
    is not ours, is taken for the machine's part. Allowed is a tenth, and on top of it the spread of both runs.

    Raises:
        ValueError: they are not of the same device and dtype, or have no case in common.
    """
    for key, default in (("device", "cpu"), ("dtype", "float32")):
        if now[key] != before.get(key, default):
            raise ValueError(f"--compare: this run is of {key} {now[key]}, the other one of {before.get(key, default)}")
    earlier = {case["name"]: case["contenders"] for case in before["cases"]}
    same_torch = now["machine"]["torch"] == before["machine"]["torch"]
    found = []
    for case in now["cases"]:
        new, old = case["contenders"], earlier.get(case["name"])
        if old is None:
            continue
        both = [name for name in new if name in old and not name.startswith("fastmeta")] if same_torch else []
        others = statistics.median([new[n]["median_ms"] / old[n]["median_ms"] for n in both]) if both else 1.0
        spread = _spread(new["fastmeta"]) + _spread(old["fastmeta"])
        if both:
            spread += statistics.median([_spread(new[n]) + _spread(old[n]) for n in both])
        ours = old["fastmeta"]["median_ms"], new["fastmeta"]["median_ms"]
        found.append(Change(case["name"], *ours, others, LEAST + spread))
    if not found:
        raise ValueError("--compare: the two runs have no workload in common")
    return sorted(found, key=lambda change: -change.times / change.allowed)
