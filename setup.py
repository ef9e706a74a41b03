"""Builds fastmeta: the Python packages, and the native kernels where a compiler is at hand.

A wheel serves Python 3.10 and later (its tag is cp310-abi3) and torch 2.11 and later (LibTorch's stable ABI).

Environment:
  FASTMETA_NO_EXT=1       pure Python, no native kernels
  FASTMETA_BUILD_CUDA=0/1 leave the CUDA kernels out, or insist on them (default: where torch is a CUDA build and
                          nvcc exists)
  TORCH_CUDA_ARCH_LIST    CUDA architectures, as for any PyTorch extension
  MAX_JOBS                parallel compilations (default: from cores and memory)
"""

import importlib.util
import os
import shutil
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# torch's own flags take half precision's conversions away, which the kernels use
NVCC_FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr"] + [
    f"-U__CUDA_NO_{what}__"
    for what in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS")
]
TORCH_ABI = "0x020b000000000000"  # LibTorch stable ABI of torch 2.11: one binary serves it and every later release


def flag(name: str) -> bool | None:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"fastmeta: {name} must be 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


def find_compiler() -> str:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for candidate in candidates:
        if shutil.which(candidate.split()[0]):
            return candidate
    raise SystemExit(
        f"fastmeta: no C++ compiler found (looked for {', '.join(candidates)}). Install one (for example "
        "the packages g++ or clang), or set FASTMETA_NO_EXT=1 to install without the native kernels."
    )


def find_cuda_home() -> None:
    """Names the toolkit: where the nvcc of PATH is a link or a script, torch takes the folder above it for that."""
    if os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return
    nvcc = shutil.which("nvcc")
    for home in ([Path(nvcc).resolve().parent.parent] if nvcc else []) + [Path("/usr/local/cuda")]:
        if (home / "include" / "cuda_runtime.h").exists() and list(home.glob("lib*/libcudart.so")):
            os.environ["CUDA_HOME"] = str(home)
            return


def want_cuda() -> bool:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    forced = flag("FASTMETA_BUILD_CUDA")
    missing = []
    if torch.version.cuda is None:
        missing.append("torch is a build without CUDA")
    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        missing.append("no nvcc (set CUDA_HOME)")
    if forced and missing:
        raise SystemExit(f"fastmeta: FASTMETA_BUILD_CUDA=1, but {' and '.join(missing)}")
    return not missing if forced is None else forced


def limit_jobs() -> None:
    """A compilation takes up to 2 GB: more jobs than memory allows end in a killed compiler."""
    if "MAX_JOBS" in os.environ:
        return
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        memory = 4 << 30
    os.environ["MAX_JOBS"] = str(max(1, min(os.cpu_count() or 1, memory // (2 << 30))))


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def write_as_python(module: Path) -> None:
    """Puts what the pybind11 module `_build_info` says into a file of Python in its place, which fits every version."""
    spec = importlib.util.spec_from_file_location("_build_info", module)
    told = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(told)
    text = f'"""{told.__doc__}"""\n\n\ndef build_info() -> dict:\n    return {told.build_info()!r}\n'
    module.with_name("_build_info.py").write_text(text)
    module.unlink()


def native() -> dict:
    """What `setup` is told of the native kernels."""
    if flag("FASTMETA_NO_EXT"):
        return {}
    compiler = find_compiler()
    find_cuda_home()
    try:
        from pybind11.setup_helpers import Pybind11Extension
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        raise SystemExit(
            f"fastmeta: building the native kernels needs torch and pybind11 in this environment ({error}). "
            "Install them first and pass --no-build-isolation to pip, or set FASTMETA_NO_EXT=1."
        ) from error
    limit_jobs()
    cuda = want_cuda()
    define = [f"-DTORCH_TARGET_VERSION={TORCH_ABI}"] + (["-DUSE_CUDA"] if cuda else [])
    # -g0: Python's own flags ask for debugging symbols, seven times the size of the kernels
    cxx = ["-O3", "-g0", "-std=c++20", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", *define]
    kernels = (CUDAExtension if cuda else CppExtension)(
        "fastmeta._C",
        sources("csrc/*.cpp") + sources("csrc/cpu/*.cpp") + (sources("csrc/cuda/*.c*") if cuda else []),
        include_dirs=[str(ROOT / "csrc" / "include")],
        depends=sources("csrc/**/*.h"),
        extra_compile_args={"cxx": cxx, "nvcc": [*NVCC_FLAGS, *define]},
        py_limited_api=True,
    )
    kernels.sources.remove("csrc/build_info.cpp")
    info = Pybind11Extension(
        "fastmeta._build_info",
        ["csrc/build_info.cpp"],
        cxx_std=17,
        define_macros=[
            ("FASTMETA_COMPILER", f'"{compiler}"'),
            ("FASTMETA_FLAGS", f'"{" ".join(cxx)}"'),
            ("FASTMETA_TORCH_TARGET", f'"{TORCH_ABI}"'),
            ("FASTMETA_WITH_CUDA", str(int(cuda))),
        ],
    )

    class Build(BuildExtension):
        def run(self):
            super().run()
            if not self.inplace:  # into a wheel
                write_as_python(Path(self.get_ext_fullpath("fastmeta._build_info")))

    return {
        "ext_modules": [kernels, info],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**native())
