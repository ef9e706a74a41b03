"""Compiles csrc/cuda for the CPU emulation: kernels and bridges as ops of `fastmeta_cuda_host` on CPU tensors.

FASTMETA_HOST_LIBRARY names a library that is built already (for one with a sanitizer), FASTMETA_HOST_BUILD a folder to
build in, so that a later run compiles only what has changed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
TORCH = Path(torch.__file__).parent
ABI = "0x020b000000000000"
LIBRARY = "libfastmeta_cuda_host.so"


def compiler() -> str | None:
    return next((c for c in (os.environ.get("CXX"), "g++") if c and shutil.which(c)), None)


def ops(tmp_path_factory):
    """The ops, compiled by the first that asks: processes that share out a run of the tests share its library."""
    if compiler() is None:
        pytest.skip("no g++ to compile the emulation with")
    library = os.environ.get("FASTMETA_HOST_LIBRARY")
    if library is None:
        base = tmp_path_factory.getbasetemp()  # a process's own folder in that of the run
        run_folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        folder = Path(os.environ.get("FASTMETA_HOST_BUILD") or run_folder / "cuda_host")
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            library = build(folder)
    torch.ops.load_library(str(library))
    return torch.ops.fastmeta_cuda_host


def build(folder: Path, *extra: str) -> Path:
    """Compile into `folder` what is not there or older than its sources, two files at a time; returns the library."""
    include = [CSRC / "include", CSRC / "cuda", HERE, TORCH / "include", TORCH / "include/torch/csrc/api/include"]
    flags = [compiler(), "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-MMD", "-DFASTMETA_HOST", *extra]
    flags += [f"-DTORCH_TARGET_VERSION={ABI}", f"-I{sysconfig.get_paths()['include']}", *(f"-I{i}" for i in include)]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        if is_newer(target, sources_of(target)):
            return target
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        # the schemas of fastmeta_native, under the emulation's name
        renamed = ["-Dfastmeta_native=fastmeta_cuda_host"] if source.name == "fastmeta.cpp" else []
        run([*flags, *renamed, *language, "-c", str(source), "-o", str(target)])
        return target

    sources = [*sorted((CSRC / "cuda").glob("*.c*")), CSRC / "fastmeta.cpp"]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / LIBRARY
    if is_newer(library, objects):
        return library
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}"]
    run([flags[0], "-shared", *extra, "-o", str(library), *map(str, objects), f"-L{TORCH / 'lib'}", *libraries])
    return library


def sources_of(target: Path) -> list[Path]:
    """What the compiler noted that it read for it."""
    note = target.with_suffix(".d")
    return [Path(p) for p in note.read_text().replace("\\\n", " ").split()[1:]] if note.exists() else []


def is_newer(target: Path, sources: list[Path]) -> bool:
    if not sources or not all(p.exists() for p in [target, *sources]):
        return False
    return target.stat().st_mtime_ns > max(p.stat().st_mtime_ns for p in sources)


def run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr[-6000:]}"
