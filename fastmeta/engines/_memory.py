"""How much memory there is, and how much a piece of work takes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

_PROCESS, _GROUPS = Path("/proc/self"), Path("/sys/fs/cgroup")
_TEXTS = ("can't allocate memory", "not enough memory", "bad_alloc")  # of the CPU's allocator, by system


def ran_out(error: BaseException) -> bool:
    """Whether `error` says that there was no memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


def free(device: torch.device) -> int | None:
    """Bytes that may still be taken on a device; None where that cannot be told. On a CPU the machine's, and no more
    than what the limits of the control group and of the process leave."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    left = [_numbers(Path("/proc/meminfo")).get("MemAvailable"), _left_in_group(), *_left_of_limits()]
    known = [number for number in left if number is not None]
    return max(0, min(known)) if known else None


class Probe:
    """The memory that is taken from when this is made until `used` is asked for, at the most; `free` before it."""

    def __init__(self, device: torch.device):
        self.device, self.free, self._before = device, free(device), None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        elif device.type == "cpu":
            with contextlib.suppress(OSError):  # then the peak is that of before, if it was higher: a larger estimate
                (_PROCESS / "clear_refs").write_text("5")
            self._before = _numbers(_PROCESS / "status").get("VmRSS")

    def used(self) -> int | None:
        """Bytes at the peak beyond those of before; None where that cannot be told."""
        if self._before is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._before
        peak = _numbers(_PROCESS / "status").get("VmHWM")
        return None if peak is None else max(0, peak - self._before)


def _numbers(path: Path) -> dict[str, int]:
    """Bytes by name, of lines such as `VmRSS: 1024 kB`; none where there is no such file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.endswith(" kB")}


def _left_in_group() -> int | None:
    """Of control groups version 2 and 1, as a container has them at their root."""
    for limit, usage, statistics, cache in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        try:
            most, now = int((_GROUPS / limit).read_text()), int((_GROUPS / usage).read_text())
            counted = dict(line.split() for line in (_GROUPS / statistics).read_text().splitlines())
        except (OSError, ValueError):  # "max" is no limit
            continue
        return most - now + int(counted.get(cache, 0))
    return None


def _left_of_limits() -> list[int]:
    try:
        import resource
    except ImportError:
        return []
    taken, left = _numbers(_PROCESS / "status"), []
    for limit, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY and name in taken:
            left.append(most - taken[name])
    return left
