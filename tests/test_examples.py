"""The examples run, a few steps each."""

import importlib
import importlib.util
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
NEEDS = {"sklearn_pipeline": ("sklearn",), "lightning_module": ("lightning", "pytorch_lightning")}  # one of them


@pytest.fixture(autouse=True)
def few_glyphs_on_one_thread(monkeypatch):
    module = importlib.import_module("fastmeta.tasks.glyphs")
    monkeypatch.setattr(module, "CLASSES", {"train": 6, "val": 5, "test": 4})
    module._glyphs.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    module._glyphs.cache_clear()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(path):
    needs = NEEDS.get(path.stem, ())
    if needs and not any(importlib.util.find_spec(name) for name in needs):
        pytest.skip(f"needs {needs[0]}")
    assert len(path.read_text().splitlines()) <= 60
    runpy.run_path(str(path))["main"](steps=2, ways=3)
