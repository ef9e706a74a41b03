"""Time the suite: case after case, everybody who does the same work in turns."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

import fastmeta
import fastmeta.ops  # noqa: F401  (fills the registry)
from fastmeta import testing
from fastmeta.dispatch import backends, native
from fastmeta.dispatch.spec import REGISTRY, Make

from . import measure, roofline, suite
from .case import Case

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
RTOL = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 0.1}  # between contenders, relative to the largest
QUICK = 0.25  # seconds a case
COMPILE = ("compiled", "JAX")  # who takes long before the first call is over, and is left out by `quick`
VERSIONS = ("torch", "numpy", "triton", "jax", "higher", "torchopt", "pykeops", "learn2learn")
VARIABLES = (
    "FASTMETA_BACKEND", "FASTMETA_CPU_ISA", "FASTMETA_KEEP_MB", "FASTMETA_CHECK_LABELS", "OMP_NUM_THREADS",
    "MKL_NUM_THREADS", "KMP_AFFINITY", "XLA_FLAGS", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is timed, and how."""

    groups: tuple[str, ...] = tuple(suite.GROUPS)
    against: tuple[str, ...] = ()  # parts of contenders' names; all, if there is none
    device: str = "cpu"
    dtype: str = "float32"
    seconds: float = 2.0  # a case
    threads: int | None = None  # where they were chosen
    quick: bool = False

    def __post_init__(self):
        """Raises ValueError where there is no such group, contender or dtype."""
        for given, known, option in ((self.groups, suite.GROUPS, "--group"), ((self.dtype,), DTYPES, "--dtype")):
            unknown = [name for name in given if name not in known]
            if unknown:
                raise ValueError(f"{option} must be of {', '.join(known)}; got {', '.join(unknown)}")
        unknown = [part for part in self.against if not any(part in name for name in suite.PEERS)]
        if unknown:
            raise ValueError(f"--against must be part of {', '.join(suite.PEERS)}; got {', '.join(unknown)}")

    def wants(self, name: str) -> bool:
        return not self.against or any(part in name for part in self.against)

    def command(self) -> str:
        words = ["fastmeta", "bench"]
        words += [word for group in self.groups if self.groups != Plan.groups for word in ("--group", group)]
        words += [word for part in self.against for word in ("--against", part)]
        words += ["--device", self.device] if self.device != "cpu" else []
        words += ["--dtype", self.dtype] if self.dtype != "float32" else []
        words += ["--threads", str(self.threads)] if self.threads else []
        words += ["--seconds", f"{self.seconds:g}"] if self.seconds != (QUICK if self.quick else Plan.seconds) else []
        words += ["--quick"] if self.quick else []
        return shlex.join(words)


def gate(device: str) -> None:
    """Refuse to time what is wrong: every op's samples first, in float32 on `device`."""
    for spec in REGISTRY.values():
        for sample in spec.samples(Make(torch.float32, device)):
            testing.check_op(spec, sample.args)


def run_case(case: Case, plan: Plan) -> dict:
    """Everything that the report says about a case; who fails, or gives other numbers than ours, is not timed."""
    contenders, absent = {"fastmeta": case.contenders["fastmeta"]}, dict(case.absent)
    truth = contenders["fastmeta"]()
    unlike = []
    others = {n: run for n, run in {**case.contenders, **case.yardsticks}.items() if n != "fastmeta" and plan.wants(n)}
    for name, run in others.items():
        if plan.quick and any(part in name for part in COMPILE):
            absent[name] = "left out by --quick: it compiles first"
            continue
        if plan.threads and "JAX" in name:
            absent[name] = "left out by --threads: it takes all cores"
            continue
        try:
            found = run()
            if name in case.contenders:
                results = {"fastmeta": lambda: truth, name: lambda found=found: found}
                measure.check_equal(results, max(case.rtol, RTOL[DTYPES[plan.dtype]]))
        except AssertionError as error:
            absent[name] = str(error)
            unlike.append(name)
        except ModuleNotFoundError as error:
            absent[name] = f"{error.name} is not installed: pip install {error.name}"
        except Exception as error:  # a peer may fail in any way
            absent[name] = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
        else:
            contenders[name] = run
    times = measure.interleaved(contenders, plan.seconds, rounds=3 if plan.quick else 5)
    medians = {name: statistics.median(t) for name, t in times.items()}
    ours = medians["fastmeta"]
    return {
        "name": case.name,
        "contenders": {name: measure.summary(t) for name, t in times.items()},
        "ratios": {name: m / ours for name, m in medians.items() if name != "fastmeta"},
        "bars": {n: {"bar": b, "met": medians[n] / ours >= b} for n, b in case.bars.items() if n in medians},
        "at_most": {n: {"bar": b, "met": ours / medians[n] <= b} for n, b in case.at_most.items() if n in medians},
        "same_work": [name for name in case.contenders if name in medians],  # the others are yardsticks
        "absent": absent,
        "unlike": unlike,
        "work": {"flops": case.flops, "nbytes": case.bytes},
        "point": case.point,
    }


def add_bounds(cases: list[dict], peak: roofline.Peak) -> None:
    """To each case its bound, by the best rates of the whole run, and who beat it, which shows that it is none."""
    for case in cases:
        case["bound"] = peak.bound(**case["work"])
        quickest = {name: case["contenders"][name]["min_ms"] for name in case["same_work"]}
        case["below_bound"] = [name for name, ms in quickest.items() if ms < case["bound"]["ms"]]


def environment() -> dict:
    """What may change a figure, beside the machine: versions, build, variables, and what else keeps the cores busy."""
    versions = {"fastmeta": fastmeta.__version__}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    return {
        "versions": versions,
        "commit": _commit(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # when the run began
        "cuda": torch.version.cuda,
        "native": native.why_missing or "built",
        "backends": {d: [b for b in backends.AUTOMATIC[d] if backends.why_missing(b, d) is None] for d in devices},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _commit() -> str | None:
    """Of the checkout that the package runs from, with a + where files differ; None without one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + "+" * bool(changed)


def run(plan: Plan, progress: Callable[[int, str], None], save: Callable[[dict], None]) -> dict:
    """The report of a whole run, or of what there was before it was interrupted.

    Args:
        plan: what is timed.
        progress: told how many groups are done, and the case that is next.
        save: given the report after every case.
    """
    began = time.monotonic()
    report = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": plan.command(),
        "machine": roofline.machine(),
        "environment": environment(),
        "device": plan.device,
        "dtype": plan.dtype,
        "quick": plan.quick,
        "complete": False,
        "cases": [],
    }
    peak = roofline.Peak(plan.device, dtype=DTYPES[plan.dtype])

    def update() -> None:
        add_bounds(report["cases"], peak)
        report.update(seconds=time.monotonic() - began, peak=peak.report(), peak_in_words=peak.words())

    try:
        progress(0, "trying every op against its reference")
        gate(plan.device)
        peak.look()
        for done, group in enumerate(plan.groups):
            for case in suite.GROUPS[group](Make(DTYPES[plan.dtype], plan.device)):
                if plan.quick and not case.quick:
                    continue
                progress(done, case.name)
                report["cases"].append({"group": group, **run_case(case, plan)})
                update()
                save(report)
            if not plan.quick:
                peak.look()
        report["complete"] = True
    except KeyboardInterrupt:
        pass  # what is done is worth keeping; `complete` says that there is more
    update()
    return report
