"""Compiles csrc/cuda for the CPU emulation: kernels and bridges as ops of `fastmeta_cuda_host` on CPU tensors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
TORCH = Path(torch.__file__).parent
ABI = "0x020b000000000000"


def compiler() -> str | None:
    return next((c for c in (os.environ.get("CXX"), "g++") if c and shutil.which(c)), None)


_built: dict[tuple[str, ...], Path] = {}  # a process can load the ops once


def build(folder: Path, *extra: str) -> Path:
    """Compile into `folder`, two files at a time; returns the shared library, the one of an earlier call if any."""
    if extra not in _built:
        _built[extra] = _compile(folder, *extra)
    return _built[extra]


def _compile(folder: Path, *extra: str) -> Path:
    include = [CSRC / "include", CSRC / "cuda", HERE, TORCH / "include", TORCH / "include/torch/csrc/api/include"]
    flags = [compiler(), "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-DFASTMETA_HOST", *extra]
    flags += [f"-DTORCH_TARGET_VERSION={ABI}", f"-I{sysconfig.get_paths()['include']}", *(f"-I{i}" for i in include)]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        # the schemas of fastmeta_native, under the emulation's name
        renamed = ["-Dfastmeta_native=fastmeta_cuda_host"] if source.name == "fastmeta.cpp" else []
        run([*flags, *renamed, *language, "-c", str(source), "-o", str(target)])
        return target

    sources = [*sorted((CSRC / "cuda").glob("*.c*")), CSRC / "fastmeta.cpp"]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "libfastmeta_cuda_host.so"
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}"]
    run([flags[0], "-shared", *extra, "-o", str(library), *map(str, objects), f"-L{TORCH / 'lib'}", *libraries])
    return library


def run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr[-6000:]}"
