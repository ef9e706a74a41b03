"""`fastmeta info`: what was built, which backends run here, and the command that brings those that do not."""

from __future__ import annotations

import platform

import torch
from rich.console import Console
from rich.table import Table

import fastmeta
from fastmeta.dispatch import backends, native, tuned
from fastmeta.dispatch.spec import REGISTRY


def gather() -> dict:
    """Everything `print_info` shows, as plain values."""
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    return {
        "fastmeta": fastmeta.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda build of torch": torch.version.cuda or "no",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": torch.get_num_threads(),
        "native": _native_info(),
        "forced backend": backends.forced_backend() or "none",
        "backends": {
            name: {device: backends.why_missing(name, device) for device in devices if device in backend.devices}
            for name, backend in backends.BACKENDS.items()
        },
        "choices": _choices(),
        "calls": {f"{op}/{backend}": count for (op, backend), count in backends.calls.items()},
    }


def _native_info() -> dict:
    if native.why_missing is not None:
        return {"missing": native.why_missing}
    from fastmeta import _C, _build_info

    return {**_build_info.build_info(), **{f"cpu {k}": v for k, v in _C.cpu_features().items()}}


def _choices() -> str:
    """Where automatic choices change, by what `fastmeta tune` found with as many threads."""
    numbers = tuned.stored().get(str(torch.get_num_threads()))
    if not numbers:
        return "built in; fastmeta tune measures this machine"
    return "measured here: " + ", ".join(f"{name} {value:,.4g}" for name, value in numbers.items())


def print_info(console: Console | None = None) -> None:
    """Print versions, build and CPU features, backends with why they are missing, and the table of ops."""
    console = console or Console()
    info = gather()
    facts = Table(show_header=False, box=None)
    for key in ("fastmeta", "python", "torch", "cuda build of torch", "gpu", "threads", "forced backend", "choices"):
        facts.add_row(key, str(info[key]))
    for key, value in info["native"].items():
        facts.add_row(key, str(value))
    console.print(facts)

    table = Table("backend", "device", "state", title="backends, in order of preference", title_justify="left")
    for name, states in info["backends"].items():
        for device, reason in states.items():
            automatic = name in backends.AUTOMATIC[device]
            ready = "ready" if automatic else "ready, when asked for"
            table.add_row(name, device, f"missing: {reason}" if reason else ready)
        if not states:
            table.add_row(name, "-", f"missing: no {' or '.join(backends.BACKENDS[name].devices)} device here")
    console.print(table)

    ops = Table("op", "what it does", "runs on", title="ops", title_justify="left")
    for name, spec in REGISTRY.items():
        if "_bwd" not in name:
            ops.add_row(name, spec.summary, ", ".join(_runs_on(info["backends"])))
    console.print(ops)


def _runs_on(backends: dict) -> list[str]:
    return [name for name, states in backends.items() if any(reason is None for reason in states.values())]
