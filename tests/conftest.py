"""What all tests share: where they run, which backends are there, and NaN in memory that nobody wrote."""

import importlib
import os
import random
import sys
from pathlib import Path

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

from fastmeta.dispatch import tuned  # noqa: E402  (after the interpreter is chosen)

tuned._over.append({})  # what a developer's machine was tuned to is not what is tested

DEVICE = "cuda" if CUDA else "cpu"
DATA = Path(os.environ.get("FASTMETA_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if not CUDA and item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_runtest_logfinish():
    """After an error of the device every further call on it fails: the worker ends, and xdist starts another."""
    if CUDA and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


@pytest.fixture(scope="session")
def data_root():
    """Folder of the real data sets; skips where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA} (FASTMETA_DATA names another folder)")
    return DATA


@pytest.fixture(scope="module")
def few_glyphs():
    """Drawing the whole alphabet takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module("fastmeta.tasks.glyphs")  # a function of the package has its name
        patch.setattr(module, "CLASSES", {"train": 6, "val": 5, "test": 5})
        yield


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command in this process, expects an exit code, and gives stdout and stderr."""
    from fastmeta import cli

    threads = torch.get_num_threads()

    def run(*arguments, code=0):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["fastmeta", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        stdout, stderr = capsys.readouterr()
        assert (leaving.value.code or 0) == code, stdout + stderr
        return stdout, stderr

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_memory():
    """`torch.empty` holds NaN: an output that a kernel forgot to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def double():
    """float64 by default, and the same draws in every test."""
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
