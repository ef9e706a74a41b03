"""The CUDA sources compile for real GPUs: no GPU needed, no spilled registers, shared memory that every chip has.

FASTMETA_RESOURCE_REPORT names a file for the table of registers, spills and shared memory of every kernel.
"""

import ast
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
BRIDGES = sorted((CSRC / "cuda").glob("*.cpp"))
CAPABILITIES = (80, 90, 100)
STATIC_SHARED_MEMORY = 48 * 1024
ABI = "0x020b000000000000"


def cuda_home() -> Path | None:
    found = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), found and Path(found).resolve().parent.parent, "/usr/local/cuda"]
    return next((Path(c) for c in candidates if c and (Path(c) / "bin" / "nvcc").exists()), None)


HOME = cuda_home()
needs_nvcc = pytest.mark.skipif(HOME is None, reason="no nvcc (CUDA_HOME, PATH and /usr/local/cuda were looked at)")


def _run(command: list) -> str:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stderr[-6000:]}"
    return result.stderr


def _demangled(names: list[str]) -> list[str]:
    if not names or shutil.which("c++filt") is None:
        return names
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True).stdout
    return [re.sub(r"fastmeta::(cuda::)?|\(anonymous namespace\)::|^void ", "", n) for n in text.splitlines()]


def _rows(source: str, log: str) -> list[dict]:
    """What ptxas says of each kernel."""
    rows = []
    spills = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
    for part in log.split("Compiling entry function ")[1:]:
        rows.append(
            {
                "source": source,
                "capability": int(re.search(r"for 'sm_(\d+)", part)[1]),
                "registers": int(re.search(r"Used (\d+) registers", part)[1]),
                "spilled": sum(map(int, spills.search(part).groups())),
                "shared": int((re.search(r"(\d+) bytes smem", part) or [0, 0])[1]),
                "kernel": re.match(r"'(\w+)'", part)[1],
            }
        )
    for row, name in zip(rows, _demangled([r["kernel"] for r in rows]), strict=True):
        row["kernel"] = re.sub(r">\(.*\)$", ">", name)
    return rows


def capabilities(source: str) -> tuple[int, ...]:
    """Inner loops take most of a minute for each kind of GPU: all of them only with FASTMETA_ALL_GPUS=1."""
    if source in ("adapt_mlp.cu", "meta_loss_mlp.cu") and os.environ.get("FASTMETA_ALL_GPUS") != "1":
        return (90,)
    return CAPABILITIES


def nvcc_flags() -> list[str]:
    """What the build hands to nvcc: torch's flags, then ours."""
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

    (ours,) = (
        node.value
        for node in ast.parse((CSRC.parent / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "NVCC_FLAGS"
    )
    return [*COMMON_NVCC_FLAGS, *eval(compile(ast.Expression(ours), "setup.py", "eval"))]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Compile every kernel file, two at a time; rows of all kernels."""
    folder = tmp_path_factory.mktemp("cuda")
    common = nvcc_flags()  # not in the threads: Python 3.11 counts the parser's recursion once for all of them

    def compile_one(source: Path) -> list[dict]:
        targets = [f"-gencode=arch=compute_{c},code=sm_{c}" for c in capabilities(source.name)]
        flags = [*common, "-Xptxas", "-v", f"-I{CSRC / 'include'}", *targets]
        log = _run([HOME / "bin" / "nvcc", *flags, "-c", source, "-o", folder / f"{source.stem}.o"])
        return _rows(source.name, log)

    with ThreadPoolExecutor(2) as pool:
        # longest files first, so that neither worker is left with one at the end
        by_size = sorted(KERNELS, key=lambda s: s.stat().st_size, reverse=True)
        rows = [row for part in pool.map(compile_one, by_size) for row in part]
    if name := os.environ.get("FASTMETA_RESOURCE_REPORT"):
        columns = ("source", "capability", "registers", "spilled", "shared", "kernel")
        lines = ["\t".join(columns)] + ["\t".join(str(r[c]) for c in columns) for r in rows]
        Path(name).write_text("\n".join(lines) + "\n")
    return rows


@needs_nvcc
def test_every_file_has_kernels_for_every_gpu(report):
    found = {(r["source"], r["capability"]) for r in report}
    with_kernels = [s.name for s in KERNELS if s.name != "errors.cu"]
    assert found == {(name, c) for name in with_kernels for c in capabilities(name)}


@needs_nvcc
def test_no_register_is_spilled(report):
    assert not [r for r in report if r["spilled"]]


@needs_nvcc
def test_static_shared_memory_fits(report):
    assert not [r for r in report if r["shared"] > STATIC_SHARED_MEMORY]


def test_kernels_know_nothing_of_torch():
    headers = [*(CSRC / "cuda").rglob("*.h"), *(CSRC / "include" / "fastmeta").glob("*.h")]
    for source in [*KERNELS, *headers]:
        if source.name.endswith("bridge.h"):
            continue
        includes = re.findall(r'#include\s+[<"]([^>"]+)', source.read_text())
        of_torch = [i for i in includes if "torch" in i or "ATen" in i or "c10" in i or i.endswith("bridge.h")]
        assert not of_torch, source.name


def test_no_two_sources_of_one_stem():
    stems = [s.stem for s in [*KERNELS, *BRIDGES]]
    assert len(stems) == len(set(stems))


@needs_nvcc
def test_bridges_compile(tmp_path):
    compiler = next((c for c in (os.environ.get("CXX"), "g++", "c++") if c and shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    torch = pytest.importorskip("torch")
    headers = Path(torch.__file__).parent / "include"
    if not (headers / "torch" / "csrc" / "stable").is_dir():
        pytest.skip("this torch has no headers of the stable ABI")
    include = [CSRC / "include", headers, headers / "torch" / "csrc" / "api" / "include", HOME / "include"]
    flags = ["-std=c++20", "-fsyntax-only", "-Wall", "-Werror", "-fvisibility=hidden", "-DUSE_CUDA",
             f"-DTORCH_TARGET_VERSION={ABI}", *(f"-isystem{i}" for i in include[1:]), f"-I{include[0]}"]  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda source: _run([compiler, *flags, source]), BRIDGES))
