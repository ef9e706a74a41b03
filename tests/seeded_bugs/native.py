"""Builds the CPU kernels for one instruction set, unoptimised: a bug costs the seconds of the files that hold it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fastmeta import _C

TORCH = Path(torch.__file__).parent
ABI = "0x020b000000000000"
TABLES = {"baseline": "kBaseline", "avx2": "kAvx2", "avx512": "kAvx512"}


class Build:
    """`tree`'s extension; objects of the right sources are kept, with the files that each depends on."""

    def __init__(self, tree: Path, objects: Path):
        self.tree, self.objects = tree, objects
        self.isa = _C.cpu_features()["isa"]
        self.x86 = "avx2" in _C.cpu_features()  # elsewhere there is but one table
        self.compiler = os.environ.get("CXX") or next(c for c in ("c++", "g++", "clang++") if shutil.which(c))
        csrc = tree / "csrc"
        left_out = {f"isa_{isa}.cpp" for isa in TABLES if self.x86 and isa != self.isa}
        sources = [csrc / "fastmeta.cpp", csrc / "module.cpp"]
        sources += [f for f in (csrc / "cpu").glob("*.cpp") if f.name not in left_out]
        self.right = self._compile(sources, "right")
        self._link(self.right)
        self.needs = {source: self._needs(self.right[source]) for source in sources}

    def with_changed(self, file: str) -> None:
        """The extension with a wrong `file` of the tree. Raises where the compiler refuses it."""
        wrong = self._compile([source for source, needs in self.needs.items() if file in needs], "wrong")
        self._link({**self.right, **wrong})

    def _compile(self, sources: list[Path], folder: str) -> dict[Path, Path]:
        include = [self.tree / "csrc/include", TORCH / "include", TORCH / "include/torch/csrc/api/include",
                   sysconfig.get_paths()["include"]]  # fmt: skip
        flags = ["-O1", "-g0", "-std=c++20", "-fPIC", "-ffp-contract=fast", "-fvisibility=hidden", "-MMD"]
        flags += [f"-DTORCH_TARGET_VERSION={ABI}", *(f"-I{i}" for i in include)]
        (self.objects / folder).mkdir(parents=True, exist_ok=True)
        objects = {source: self.objects / folder / f"{source.stem}.o" for source in sources}
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda s: call([self.compiler, *flags, "-c", str(s), "-o", str(objects[s])]), sources))
        return objects

    def _needs(self, target: Path) -> set[str]:
        """Files of the tree that an object was compiled from."""
        names = target.with_suffix(".d").read_text().replace("\\\n", " ").split()[1:]
        return {os.path.relpath(os.path.normpath(n), self.tree) for n in names if n.startswith(f"{self.tree}/")}

    def _link(self, objects: dict[Path, Path]) -> None:
        # the other instruction sets' tables are this one's
        symbol = "_ZN8fastmeta3cpu{0}{1}E".format
        table = TABLES[self.isa]
        aliases = [
            f"-Wl,--defsym={symbol(len(other), other)}={symbol(len(table), table)}"
            for other in TABLES.values()
            if self.x86 and other != table
        ]
        library = self.tree / "fastmeta" / "_C.abi3.so"
        library.unlink(missing_ok=True)
        torch_libraries = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}"]
        call([self.compiler, "-shared", "-o", str(library), *map(str, objects.values()), *aliases, *torch_libraries])


def call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
