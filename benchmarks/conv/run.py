"""One row: who is right is found out on a small copy in float64, then everybody who is runs in turns."""

from __future__ import annotations

import contextlib
import signal
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from fastmeta.dispatch.spec import Make

from .. import measure
from ..modules import engine_of
from .rows import COMPILED, ROWS, Build, Row, maml, on_gpu

EXACT = 1e-9  # largest difference in float64, relative to the largest number
CLOSE = 0.05  # the same of the whole gradient's norm in float32, at full size: no other code may run there
HOPELESS = 4  # who takes so many times the fastest peer's time is timed once
PATIENCE = 240  # seconds that torch.compile may take


class Skipped(Exception):
    """Why a peer is not timed."""


@contextlib.contextmanager
def patient(name: str) -> Iterator[None]:
    """Ends a compilation that takes too long; what else goes wrong with a peer is why it is skipped."""

    def give_up(*_):
        raise TimeoutError

    limited = name in COMPILED
    before = signal.signal(signal.SIGALRM, give_up) if limited else None
    started = time.monotonic()
    if limited:
        signal.alarm(PATIENCE)
    try:
        yield
    except Exception as error:  # a peer may fail in any way
        if limited and time.monotonic() - started >= PATIENCE:
            raise Skipped(f"not compiled within {PATIENCE} s") from error
        what, *_ = str(error).strip().splitlines() or [""]
        raise Skipped(f"{type(error).__name__}: {what}") from error
    finally:
        if limited:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)


def check(row: Row, device: str, without: Callable[[str], bool]) -> dict[str, str]:
    """Ours against the first peer, and who of the others is to be skipped, and why.

    Raises:
        AssertionError: ours is not the gradient.
    """

    def small():  # each has its own: nobody leaves anything in another's net
        return row.make(Make(torch.float64, device), True)

    first, *others = row.peers | row.also
    truth = row.peers[first](small())()
    measure.check_equal({first: lambda: truth, "fastmeta": row.ours(small())}, EXACT)
    skipped = {}
    for name in others:
        if without(name):
            skipped[name] = "left out"
            continue
        try:
            with patient(name):
                measure.check_equal({first: lambda: truth, name: (row.peers | row.also)[name](small())}, EXACT)
        except Skipped as reason:
            skipped[name] = str(reason).removeprefix("AssertionError: ")
    return skipped


def distance(ours, theirs) -> float:
    """Of two gradients, relative to the norm of the second."""
    a, b = (torch.cat([t.double().flatten() for t in measure._tensors(value)]) for value in (ours, theirs))
    return float((a - b).norm() / b.norm())


def timed(run: measure.Contender) -> float:
    measure.synchronize()
    start = time.perf_counter()
    measure.synchronize(run())
    return time.perf_counter() - start


def run_row(
    key: str, *, device: str, dtype: torch.dtype, seconds: float, small: bool, without: Callable[[str], bool]
) -> dict:
    """Everything that the report says about a row."""
    row = ROWS[key]
    skipped = check(row, device, without)

    def fresh():
        return row.make(Make(dtype, device), small)

    ours = fresh()
    runs, once, first = {"fastmeta": row.ours(ours)}, {}, next(iter(row.peers))
    gradient = [g.clone() for g in runs["fastmeta"]()]
    everybody = row.peers | row.yardsticks | row.also
    if torch.device(device).type == "cuda":
        everybody |= on_gpu(row)
    builds: dict[str, Build] = {name: build for name, build in everybody.items() if name not in skipped}
    far: dict[str, float] = {}
    for name, build in builds.items():
        try:
            with patient(name):
                run = build(fresh())
                found = run()
                once[name] = timed(run)
                runs[name] = run
        except Skipped as reason:
            skipped[name] = str(reason)
            continue
        if not name.startswith("supervised"):
            far[name] = distance(gradient, found)
    if dtype == torch.float32:
        assert far[first] < CLOSE, f"{key}: at full size fastmeta is {far[first]:.1e} from {first}"
    counted = [name for name in row.counted or row.peers if name in runs]
    hopeless = {n for n in runs if n in row.peers and once[n] > HOPELESS * min(once[n] for n in counted)}
    rounds = 1 if small else 5
    times = measure.interleaved({n: run for n, run in runs.items() if n not in hopeless}, seconds, rounds=rounds)
    medians = {name: statistics.median(of) for name, of in times.items()}

    def against(names: list[str]) -> tuple[str, float]:
        fastest = min((name for name in names if name in medians), key=medians.__getitem__)
        return fastest, medians[fastest] / medians["fastmeta"]

    peer, ratio = against(counted)
    report = {
        "key": key,
        "title": row.title,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.device(device).type,
        "small": small,
        "engine": engine_of(maml(ours), ours.batch) if ours.steps else None,
        "distance": far,  # of ours from others' in this precision, relative: one winner of a pool may be another
        "contenders": {name: measure.summary(of) for name, of in times.items()},
        "one_call_ms": {name: once[name] * 1e3 for name in sorted(hopeless)},
        "skipped": skipped,
        "peer": {"name": peer, "ratio": ratio, "bar": row.faster, "met": ratio >= row.faster},
    }
    if row.yardsticks:
        plain, times_faster = against(list(row.yardsticks))
        taken = 1 / times_faster
        met = None if row.at_most is None else taken <= row.at_most
        report["supervised"] = {"name": plain, "ratio": taken, "bar": row.at_most, "met": met}
    return report
