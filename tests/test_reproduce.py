"""`fastmeta reproduce`: rows run once, a stopped suite goes on, the table is written."""

import importlib
import json

import pytest
from rich.console import Console

from fastmeta.cli.reproduce import SUITES, reproduce
from fastmeta.training.registry import ALGORITHMS


@pytest.fixture(autouse=True)
def few_glyphs(monkeypatch):
    """Enough for 60 ways; drawing the whole alphabet takes seconds."""
    module = importlib.import_module("fastmeta.tasks.glyphs")
    monkeypatch.setattr(module, "CLASSES", {"train": 60, "val": 6, "test": 6})
    monkeypatch.delenv("FASTMETA_DATA", raising=False)


def test_every_algorithm_has_a_row():
    for rows in SUITES.values():
        suite = rows("glyphs")
        assert {row.algorithm for row in suite} == set(ALGORITHMS)
        assert len({row.name for row in suite}) == len(suite)


def test_rows_run_once_and_the_table_is_written(tmp_path):
    console = Console(record=True, width=200)
    names = ["maml-sinusoid", "ridge-glyphs"]
    results = reproduce("smoke", tmp_path, only=names, episodes=8, console=console)
    assert [r["name"] for r in results] == names
    assert "maml-sinusoid: MSE" in console.export_text()
    assert results[0]["loss"]["mean"] > 0 and 0 <= results[1]["accuracy"]["mean"] <= 1
    before = (tmp_path / "smoke" / "ridge-glyphs" / "result.json").stat().st_mtime_ns
    again = reproduce("smoke", tmp_path, only=names, episodes=8, console=console)
    assert again == results
    assert (tmp_path / "smoke" / "ridge-glyphs" / "result.json").stat().st_mtime_ns == before
    assert json.loads((tmp_path / "smoke" / "table.json").read_text()) == results
    assert 0 <= results[1]["calibration_error"] <= 1
    assert "| ridge-glyphs |" in (tmp_path / "smoke" / "table.md").read_text()


def test_unknown_suite_and_row(tmp_path):
    with pytest.raises(ValueError, match="suite must be one of quick, paper, smoke, cross-domain; got 'all'"):
        reproduce("all", tmp_path)
    with pytest.raises(ValueError, match="got maml-cifar"):
        reproduce("smoke", tmp_path, only=["maml-cifar"])
