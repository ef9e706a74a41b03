"""Where one way of computing begins to be faster than another on this machine.

Automatic choices compare a size with a number. What stands in the code was measured on one machine; `fastmeta tune`
measures on the user's, and writes what it finds to a file of the cache folder, which is read here when the first choice
is made. Either way gives the same up to rounding: only times differ.
"""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastmeta import _cache

FORMAT = 1  # another one is not read: what a number means has changed
# what each choice compares with the number; below it the first way is taken, from it on the second
CHOICES = {
    "one_pass": "numbers in a batch norm's input: torch's layers, then norm, activation and pool in one pass",
    "mapped": "numbers in a task's largest activation: convolutions mapped over the tasks, then a loop over the tasks",
    "fused": "weights of a task: whole inner loops in one kernel, then the engines lowrank and layerwise",
    "lowrank": "support rows of all steps over the layers' mean width: engine lowrank, then layerwise",
}
_over: list[Mapping[str, float]] = []


def number(name: str, built_in: float, *, cuda: bool = False) -> float:
    """The number of choice `name`: the one measured on this machine with as many threads, else `built_in`."""
    if _over:
        return _over[-1].get(name, built_in)
    if cuda or torch.compiler.is_compiling():  # which could not follow the reading of a file
        return built_in
    return stored().get(str(torch.get_num_threads()), {}).get(name, built_in)


@contextmanager
def using(numbers: Mapping[str, float]) -> Iterator[None]:
    """Inside, these numbers hold, and the built-in ones where there is none; the file is not read."""
    _over.append(numbers)
    try:
        yield
    finally:
        _over.pop()


def path() -> Path:
    return _cache.named_folder() / "tuned.json"


def machine() -> dict[str, Any]:
    """What the numbers hold for: a file of anything else is passed over."""
    try:
        version = metadata.version("fastmeta")
    except metadata.PackageNotFoundError:  # runs from its source, not installed
        version = None
    return {
        "format": FORMAT,
        "fastmeta": version,
        "torch": torch.__version__,
        "cpu": _cpu(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


@cache
def stored() -> Mapping[str, Mapping[str, float]]:
    """The numbers of the cache's file, by threads and name; none where it is absent, damaged or of another machine."""
    try:
        file = path()
        text = file.read_text()
    except (OSError, ImportError):  # nothing was measured
        return {}
    try:
        found = json.loads(text)
        of, threads = found["machine"], found["threads"]
        numbers = {n: {name: float(v) for name, v in of_n.items() if name in CHOICES} for n, of_n in threads.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return _passed_over(file, "it is damaged")
    here = machine()
    for what, value in here.items():
        if of.get(what) != value:
            return _passed_over(file, f"its {what} is {of.get(what)}, here {value}")
    if not all(value >= 0 for of_n in numbers.values() for value in of_n.values()):  # no NaN either
        return _passed_over(file, "it is damaged")
    return numbers


def _passed_over(file: Path, why: str) -> Mapping[str, Mapping[str, float]]:
    warnings.warn(f"{file} is passed over: {why}; fastmeta tune measures anew", stacklevel=4)
    return {}


@cache
def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
