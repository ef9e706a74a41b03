"""What this machine can do at best, and so the least time that a workload's arithmetic and bytes take.

A bound holds only if nothing beats its rates. So the rates are the best of many looks, spread over the whole run: of
multiply-adds in registers (CPU; a vendor library's matrix products reach half of that on some processors) and of matrix
products of several shapes, and of streams as large as what the workload moves: what fits in a cache may lie there.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .measure import synchronize

STREAMS = tuple(2**power for power in range(15, 28, 2))  # bytes of all threads together: 32 KB to 128 MB
PRODUCTS = ((1024, 1024, 1024), (2048, 2048, 2048), (8192, 256, 1024))
BURST = 2**21  # bytes, or twice that of multiply-adds, in what a thread does between two looks at the clock: 0.1 ms

Work = tuple[str, int, Callable[[], float]]  # kind, bytes of a stream, a call that returns operations or bytes a second


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


@dataclass
class Peak:
    """The best rates that `look` has seen on a device."""

    device: str
    multiply_add: float = 0  # GFLOP/s; 0 where products of matrices alone are looked at: on a GPU, without a compiler
    product: float = 0  # large matrix products, GFLOP/s
    streams: dict[int, float] = field(default_factory=dict)  # bytes gone over again and again: GB/s
    dtype: torch.dtype = torch.float32

    def look(self, rounds: int = 3) -> None:
        """Measure everything once more, in turns, and keep what is better."""
        for kind, size, run in list(_works(self.device, self.dtype)) * rounds:
            rate = run() / 1e9
            if kind == "multiply_add":
                lanes = 4 / self.dtype.itemsize  # it is of float32
                self.multiply_add = max(self.multiply_add, rate * lanes)
            elif kind == "product":
                self.product = max(self.product, rate)
            else:
                self.streams[size] = max(self.streams.get(size, 0), rate)

    def bound(self, flops: float, nbytes: float) -> dict[str, float | str]:
        """Least milliseconds for the work, and `by`: what it is that takes so long."""
        # a stream a quarter as large is surely no slower than this workload's memory, and there is one in between
        bandwidth = max(rate for size, rate in self.streams.items() if size >= min(nbytes / 4, max(self.streams)))
        arithmetic, moving = flops / max(self.multiply_add, self.product) * 1e-6, nbytes / bandwidth * 1e-6
        by = "arithmetic" if arithmetic >= moving else f"bytes at {bandwidth:.0f} GB/s"
        return {"ms": max(arithmetic, moving), "by": by}

    def report(self) -> dict:
        """As the report's JSON has it."""
        streams = {str(size): rate for size, rate in sorted(self.streams.items())}
        return {"multiply_add_gflops": self.multiply_add, "product_gflops": self.product, "stream_gbytes": streams}

    def words(self) -> str:
        sizes = ", ".join(
            f"{size // 1024} KB: {rate:.0f}" if size < 2**20 else f"{size // 2**20} MB: {rate:.0f}"
            for size, rate in sorted(self.streams.items())
        )
        adds = f"multiply-adds {self.multiply_add:.0f} GFLOP/s, " if self.multiply_add else ""
        return f"at best {adds}matrix products {self.product:.0f} GFLOP/s, streams ({sizes}) GB/s"


def _works(device: str, dtype: torch.dtype) -> Iterator[Work]:
    """All that is looked at."""
    for m, k, n in PRODUCTS:
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
        yield "product", 0, functools.partial(_rate, functools.partial(torch.mm, a, b), 2 * m * k * n)
    if torch.device(device).type == "cpu":
        try:
            yield from _native_works()
            return
        except (OSError, subprocess.CalledProcessError):  # no compiler: torch's own streams reach less
            pass
    for size in STREAMS:
        a, b, to = torch.randn(3, size // 12, device=device)
        triad, read = functools.partial(torch.add, a, b, alpha=0.5, out=to), torch.randn(size // 4, device=device).sum
        repeats = min(100, 2**28 // size)
        yield "triad", size, functools.partial(_rate, triad, 3 * to.nbytes, repeats)
        yield "read", size, functools.partial(_rate, read, size, repeats)


def _rate(run: Callable[[], object], amount: float, repeats: int = 1) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize()
    return amount * repeats / (time.perf_counter() - start)


@functools.cache
def _native_works() -> tuple[Work, ...]:
    """Of peak.cpp, on as many threads as torch has, each on memory of its own."""
    native, threads = _native(), torch.get_num_threads()
    pool = ThreadPoolExecutor(threads)  # a call of ctypes lets the other threads run

    def work(kind: str, size: int, function: Callable[..., float], floats: int, *numbers: int) -> Work:
        memory = torch.ones(threads, floats)

        def call(thread: int) -> float:
            return function(ctypes.c_void_p(memory[thread].data_ptr()), *(ctypes.c_long(n) for n in numbers))

        return kind, size, lambda: sum(pool.map(call, range(threads)))

    works = [work("multiply_add", 0, native.multiply_adds, 16, BURST // 16, 50)]
    for size in STREAMS:
        floats = size // threads // 64 * 16
        rounds, bursts = max(1, BURST // (4 * floats)), max(3, min(20, 2**26 // size))
        works.append(work("read", size, native.read, floats, floats, rounds, bursts))
        works.append(work("triad", size, native.triad, floats, floats, rounds, bursts))
    return tuple(works)


@functools.cache
def _native() -> ctypes.CDLL:
    """peak.cpp, compiled for this processor."""
    source, compiler = Path(__file__).with_name("peak.cpp"), os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "peak.so"
        flags = ["-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run([*compiler.split(), *flags, "-o", str(library), str(source)], check=True, capture_output=True)
        native = ctypes.CDLL(str(library))  # stays loaded when the file is gone
    for function in (native.multiply_adds, native.read, native.triad):
        function.restype = ctypes.c_double
    return native
