"""The benchmark suite runs, compares equal work, and reports; its figures mean nothing here."""

import json

import pytest
import torch
from conftest import DEVICE
from typer.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks import measure, suite
from fastmeta.dispatch.spec import Make


def test_unlike_work_is_refused():
    with pytest.raises(AssertionError, match="b, result 0 differs from a"):
        measure.check_equal({"a": lambda: torch.ones(3), "b": lambda: torch.zeros(3)})


@pytest.mark.parametrize("group", ["functional_mlp", "protonet", "maml"])
def test_contenders_of_a_group_agree(group):
    for case in suite.GROUPS[group](Make(torch.float32, DEVICE)):
        if "T1000" not in case.name:  # the loop over a thousand tasks takes too long here
            measure.check_equal(case.contenders)


def test_report(tmp_path, monkeypatch):
    import typer

    app = typer.Typer()
    app.command()(command.main)
    result = CliRunner().invoke(
        app, ["--group", "functional_mlp", "--seconds", "0.1", "--out", str(tmp_path), "--device", DEVICE]
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "suite.json").read_text())
    case = report["cases"][0]
    assert set(case["contenders"]) == {"fastmeta", "baddbmm chain"}
    assert case["ratios"]["baddbmm chain"] > 0 and case["bound_ms"] > 0
    assert "| functional_mlp fwd T1000-B20-1x40x40x1 | fastmeta |" in (tmp_path / "suite.md").read_text()
