"""Interleaved timing: in every round each contender runs once, so that what disturbs the machine disturbs all alike."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable

import torch

Contender = Callable[[], object]
LONG = 0.5  # seconds of a call in which threads and caches come back by themselves


def synchronize(results: object = None) -> None:
    """Wait for the device, and for `results` where another framework computes them in its own time."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    for result in results if isinstance(results, list) else ():
        if hasattr(result, "block_until_ready"):
            result.block_until_ready()


def check_equal(contenders: dict[str, Contender], rtol: float = 1e-3) -> None:
    """All contenders return the same numbers, relative to the largest: unlike work is not timed.

    Raises:
        AssertionError: naming the contender that differs from the first.
    """
    results = {name: _tensors(run()) for name, run in contenders.items()}
    first_name, first = next(iter(results.items()))
    # of all results together: one of them may be nothing but rounding, as the gradient of a bias that cancels
    scale = max(float(t.abs().max()) for t in first)
    for name, tensors in results.items():
        assert len(tensors) == len(first), f"{name} returns {len(tensors)} tensors, {first_name} {len(first)}"
        for i, (a, b) in enumerate(zip(tensors, first, strict=True)):
            assert a.shape == b.shape, f"{name}, result {i}: shape {list(a.shape)}, {first_name} {list(b.shape)}"
            error = float((a - b).abs().max()) / scale
            assert error < rtol, f"{name}, result {i} differs from {first_name}: relative error {error:.1e}"


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value.detach().cpu()]
    if hasattr(value, "__array__"):  # another framework's
        return [torch.tensor(value.__array__())]
    return [t for item in value for t in _tensors(item)]


def interleaved(
    contenders: dict[str, Contender], seconds: float = 4.0, seed: int = 0, rounds: int = 5
) -> dict[str, list[float]]:
    """Seconds per call of each contender, one figure a round of at least `rounds`, in a new random order each round.

    A contender quicker than 5 ms runs several times a round, and the figure is the mean of those. Half as many calls
    before the clock starts bring threads and caches back from what ran before (one alone does not, after a contender
    that fills hundreds of megabytes): what is timed is a training loop's next step. Who takes half a second has no such
    call, and who takes longer than `seconds` no more than three figures.
    """
    once = {}
    for name, run in contenders.items():
        run()
        once[name] = _time(run, 1, warm=False)
    repeats = {}
    for name, run in contenders.items():
        seconds_a_call = once[name] if once[name] > 0.05 else _time(run, 3)
        repeats[name] = max(1, min(100, int(5e-3 / max(seconds_a_call, 1e-9))))
    most = {name: min(rounds, 3) if once[name] > max(seconds, LONG) else math.inf for name in contenders}
    order, shuffle = list(contenders), random.Random(seed).shuffle
    times: dict[str, list[float]] = {name: [] for name in contenders}
    end, done = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or done < rounds:
        shuffle(order)
        for name in order:
            if len(times[name]) < most[name]:
                times[name].append(_time(contenders[name], repeats[name], once[name] < LONG))
        done += 1
    return times


def _time(run: Contender, repeats: int, warm: bool = True) -> float:
    results = None
    for _ in range(1 + repeats // 2 if warm else 0):
        results = run()
    synchronize(results)
    start = time.perf_counter()
    for _ in range(repeats):
        results = run()
    synchronize(results)
    return (time.perf_counter() - start) / repeats


def summary(times: list[float]) -> dict[str, float]:
    """Median and quartiles, in milliseconds."""
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {
        "median_ms": statistics.median(times) * 1e3,
        "p25_ms": quartiles[0] * 1e3,
        "p75_ms": quartiles[2] * 1e3,
        "min_ms": min(times) * 1e3,
        "rounds": len(times),
    }
