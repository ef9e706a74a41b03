"""What all tests share: where they run, which backends are there, and NaN in memory that nobody wrote."""

import os
from pathlib import Path

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

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


@pytest.fixture
def poisoned_memory():
    """`torch.empty` holds NaN: an output that a kernel forgot to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
