"""What this machine can do at best: float32 multiply-adds of a large GEMM, and bytes of a large copy."""

from __future__ import annotations

import platform
import statistics

import torch

from benchmarks.measure import interleaved


def machine() -> dict[str, str | int]:
    """The machine in words, for the head of every report."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": name,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def measure(device: str) -> dict[str, float]:
    """Peak float32 rate (GFLOP/s) and copy bandwidth (GB/s, bytes read plus written) of `device`."""
    a = torch.randn(2048, 2048, device=device)
    big = torch.randn(1 << 25, device=device)
    into = torch.empty_like(big)
    times = interleaved({"gemm": lambda: a @ a, "copy": lambda: into.copy_(big)}, seconds=2)
    return {
        "gflops": 2 * 2048**3 / statistics.median(times["gemm"]) / 1e9,
        "gbytes": 2 * big.nbytes / statistics.median(times["copy"]) / 1e9,
    }


def bound_ms(flops: float, nbytes: float, peak: dict[str, float]) -> float:
    """Least time that the work can take: arithmetic or bytes, whichever is longer."""
    return max(flops / peak["gflops"], nbytes / peak["gbytes"]) * 1e-6
