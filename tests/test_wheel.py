"""What a wheel promises: one binary for all of Python from 3.10 and of torch from 2.11 on; and build.toml for the hub.

`make wheel` makes one, `make test-wheel` installs it where there are no sources (tests/check_wheel.py).
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastmeta.dispatch import native

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parent.parent
HUB = tomllib.loads((ROOT / "build.toml").read_text())
# the newest symbols of a system that manylinux_2_28 stands for, which is what torch's own wheels ask for
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}

needs_native = pytest.mark.skipif(native.why_missing is not None, reason=str(native.why_missing))


_TAG = """
import setuptools  # brings distutils, which newer Pythons have not
from distutils.core import run_setup
distribution = run_setup("setup.py", [], stop_after="init")
command = distribution.get_command_obj("bdist_wheel")
command.ensure_finalized()
print(*command.get_tag())
for extension in distribution.ext_modules or []:
    print(extension.name, extension.py_limited_api, *extension.sources)
"""


def described(**environment: str) -> list[list[str]]:
    """The wheel's tag, and the name, limited API and sources of its modules, from setup.py; nothing is built."""
    pytest.importorskip("setuptools")
    environment = {**os.environ, "FASTMETA_NO_EXT": "", **environment}
    done = subprocess.run([sys.executable, "-c", _TAG], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_the_tag_names_no_version_of_python_but_the_oldest():
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no compiler: setup.py refuses")
    (python, abi, platform), kernels, info = described(FASTMETA_BUILD_CUDA="0")
    assert (python, abi) == ("cp310", "abi3") and platform != "any"
    assert kernels[:2] == ["fastmeta._C", "True"] and "csrc/module.cpp" in kernels
    # the one module that is not of the limited API leaves the wheel as a file of Python
    assert info == ["fastmeta._build_info", "False", "csrc/build_info.cpp"]


def test_without_kernels_the_wheel_is_for_every_platform():
    assert described(FASTMETA_NO_EXT="1") == [["py3", "none", "any"]]


def test_a_file_of_python_takes_the_place_of_the_pybind11_module(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTMETA_NO_EXT", "1")
    monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])
    monkeypatch.chdir(ROOT)
    setup = runpy.run_path("setup.py")
    module, written = tmp_path / "_build_info.built.py", tmp_path / "_build_info.py"
    says = {"compiler": "gcc '12'", "cxx_standard": 20}
    module.write_text(f'"""how it was built"""\ndef build_info():\n    return {says}\n')
    setup["write_as_python"](module)
    file = runpy.run_path(str(written))
    assert file["build_info"]() == says and file["__doc__"] == "how it was built" and not module.exists()


def undefined(*options: str) -> list[str]:
    from fastmeta import _C

    if not shutil.which("nm"):
        pytest.skip("no nm here")
    done = subprocess.run(["nm", "-D", "--undefined-only", *options, _C.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.split(maxsplit=1)[1] for line in done.stdout.splitlines()]


@needs_native
def test_the_kernels_use_the_limited_api_and_the_stable_abi_alone():
    names = [symbol.split("@")[0] for symbol in undefined()]
    of_python = {name for name in names if re.match(r"_?Py", name)}
    assert of_python == {"PyBool_FromLong", "PyModule_Create2", "Py_BuildValue"}  # all in the limited API of 3.10

    # C functions are those of the stable shims, in their headers; C++ ones are none of torch's
    headers = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    shims = "".join(p.read_text() for d in ("stable/c", "inductor/aoti_torch/c") for p in (headers / d).glob("*.h"))
    of_torch = {name for name in names if re.match(r"aoti_|torch_", name)}
    assert len(of_torch) > 20, "the shims are no longer seen"
    assert not {name for name in of_torch if not re.search(rf"\b{name}\b", shims)}
    cxx = [symbol for symbol in undefined("-C") if re.search(r"\b(at|c10|torch|caffe2|pybind11)::", symbol)]
    assert not cxx, f"these are of no stable ABI: {cxx}"


@needs_native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="versions of symbols are Linux's")
def test_the_kernels_load_on_systems_as_old_as_those_of_torch():
    versions = [symbol.split("@")[1] for symbol in undefined() if "@" in symbol]
    newer = []
    for version in versions:
        family, number = version.lstrip("@").split("_", 1)
        if tuple(map(int, number.split("."))) > NEWEST[family]:
            newer.append(version)
    assert versions and not newer


def test_build_toml_names_every_native_file():
    listed = [path for part in (HUB["torch"], *HUB["kernel"].values()) for path in part["src"]]
    missing = [path for path in listed if not (ROOT / path).is_file()]
    assert not missing
    on_disk = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    on_disk |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "torch-ext").glob("*.*")}
    # what makes the module fastmeta._C is not for the hub, which makes a module of its own
    assert set(listed) == on_disk - {"csrc/module.cpp", "csrc/build_info.cpp"}
    for name, kernel in HUB["kernel"].items():
        assert kernel["backend"] == name and len(set(kernel["src"])) == len(kernel["src"])
        assert not [path for path in kernel["src"] if not path.startswith((f"csrc/{name}/", "csrc/include/"))]


def test_build_toml_has_the_layout_of_kernel_builder():
    """Edition 5 of its schema: no other keys are allowed, and these are needed."""
    assert set(HUB) == {"general", "torch", "kernel"}
    general = HUB["general"]
    assert set(general) == {"name", "version", "edition", "license", "backends"} and general["edition"] == 5
    assert set(general["backends"]) == set(HUB["kernel"]) == {"cpu", "cuda"}
    assert (ROOT / "torch-ext" / general["name"] / "__init__.py").is_file()
    assert set(HUB["torch"]) <= {"src", "include", "cxx-flags", "stable-abi", "minver", "maxver", "pyext"}
    for kernel in HUB["kernel"].values():
        assert kernel["depends"] == ["torch"]
        assert set(kernel) - {f"{kernel['backend']}-flags"} <= {"backend", "depends", "src", "include", "cxx-flags"}
        assert all((ROOT / folder).is_dir() for folder in kernel["include"])


@needs_native
def test_build_toml_asks_for_what_setup_py_does():
    from fastmeta import _build_info

    told = _build_info.build_info()
    major, minor = map(int, HUB["torch"]["stable-abi"].split("."))
    assert int(told["torch_target"], 16) == major << 56 | minor << 48
    # `-O3`, the standard and contraction change what is computed, or whether it compiles
    needed = {"-O3", "-std=c++20", "-ffp-contract=fast"}
    assert needed <= set(told["flags"].split())
    for kernel in HUB["kernel"].values():
        assert set(kernel["cxx-flags"]) == needed | {"-Dfastmeta_native=TORCH_EXTENSION_NAME"}
