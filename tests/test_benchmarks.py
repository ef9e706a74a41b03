"""The benchmark suite runs, compares equal work, and reports; its figures mean nothing here."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from conftest import DEVICE
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks import counts, measure, roofline, suite
from benchmarks.conv import __main__ as conv_command
from benchmarks.conv import memory as conv_memory
from benchmarks.conv import problem as conv_problem
from benchmarks.conv import report as conv_report
from benchmarks.conv import rows as conv_rows
from benchmarks.conv import run as conv_run
from fastmeta import MAML
from fastmeta.dispatch.spec import REGISTRY, Make


def test_unlike_work_is_refused():
    with pytest.raises(AssertionError, match="b, result 0 differs from a"):
        measure.check_equal({"a": lambda: torch.ones(3), "b": lambda: torch.zeros(3)})


@pytest.mark.parametrize(
    "group", ["functional_mlp", "protonet", "task_weights", "maml", "task_conv2d", "norm_act_pool"]
)
def test_contenders_of_a_group_agree(group):
    for case in suite.GROUPS[group](Make(torch.float32, DEVICE)):
        # a loop over a thousand tasks takes too long here, and so do products of large convolutions
        if not any(size in case.name for size in ("T1000", "14x14x64-O", "42x42x32-O", "28x28x64-b")):
            measure.check_equal(case.contenders)


def flops_of(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_meta_gradient_counted_by_hand():
    """3-4-2, two support and five query rows, two steps: every product `[m, n]` by `[n, p]`, its sizes written out."""
    forward, backward, outer = (2, 4, 2), (2, 2, 4), (2, 2, 4)  # Z = A W^T; D W; D^T A
    # each step takes one of each, and its part of the sweep two: A'W^T and A R^T, D'W and D R, D'^T A and D^T A'
    second = 2 * 3 * [forward, backward, outer] + [(5, 4, 2), (5, 2, 4), (2, 5, 4)]
    # X W^T and the gradient of W; (X X^T + 1) C in the second step, and its adjoint; X X^T: three of four elements
    first = [(2, 3, 4), (4, 2, 3)] + 2 * [(2, 2, 4)]
    symmetric = 3 * 2 * 3
    # queries, weights formed: update, product, the gradient of the weights, and X times that
    queries = [(4, 2, 3), (5, 3, 4), (4, 5, 3), (2, 3, 4)]
    by_hand = symmetric + sum(2 * m * n * p for m, n, p in second + first + queries)
    assert counts.maml((3, 4, 2), 1, 2, 5, 2) == by_hand
    assert counts.maml((3, 4, 2), 7, 2, 5, 2) == 7 * by_hand


@pytest.mark.parametrize(
    "sizes, rows, queries, steps",
    [
        ((20, 16, 12, 3), 5, 30, 1),  # queries too many for low rank
        ((20, 16, 12, 3), 5, 30, 4),  # a first layer of coefficients, the others formed
        ((50, 64, 64, 5), 2, 3, 1),  # low rank
        ((50, 64, 64, 5), 2, 3, 3),
        ((3, 40, 40, 2), 10, 10, 1),  # examples too narrow for coefficients
        ((3, 40, 40, 2), 10, 10, 5),
    ],
)
def test_least_flops_are_reached_and_not_beaten(sizes, rows, queries, steps):
    """By the engines whose products torch can count; none of them takes the best form of every layer."""
    model, loss, batch, _ = suite.maml_batch(sizes, 2, rows, queries, steps)
    plain = flops_of(lambda: suite.peers.supervised(model, loss, batch))
    assert plain == counts.supervised(sizes, 2 * (rows + queries))
    taken = []
    for engine in ("lowrank", "layerwise", "vmap"):
        maml = MAML(model, inner_lr=0.01, inner_steps=steps, engine=engine)
        taken.append(flops_of(lambda maml=maml: torch.autograd.grad(maml(batch).loss, list(maml.parameters()))))
    least = counts.maml(sizes, 2, rows, queries, steps)
    assert least <= min(taken) <= 1.2 * least


@pytest.mark.parametrize(
    "group, peer, at_most",
    [
        ("prototypical_loss", "unfused", 1.6),  # prototypes are products there
        ("contrastive_loss", "matrix", 2.1),  # its matrix of scores is whole
        ("pairwise_distance", "bmm", 1),
        ("functional_mlp", "baddbmm chain", 1),
    ],
)
def test_peers_do_the_counted_flops(group, peer, at_most):
    case = next(suite.GROUPS[group](Make(torch.float32)))
    assert case.flops <= flops_of(case.contenders[peer]) <= at_most * case.flops


def test_bounds():
    peak = roofline.Peak("cpu", multiply_add=100, product=80, streams={2**15: 400, 2**21: 200, 2**25: 20})
    assert peak.bound(1e9, 2**10) == {"ms": pytest.approx(10), "by": "arithmetic"}
    in_cache, in_memory = peak.bound(0, 2**21), peak.bound(0, 2**28)
    assert in_cache == {"ms": pytest.approx(2**21 / 200e6), "by": "bytes at 200 GB/s"}
    assert in_memory == {"ms": pytest.approx(2**28 / 20e6), "by": "bytes at 20 GB/s"}


def test_looking_again_only_raises_rates():
    peak = roofline.Peak("cpu")
    peak.look(rounds=1)
    before = roofline.Peak("cpu", peak.multiply_add, peak.product, dict(peak.streams))
    peak.look(rounds=1)
    assert peak.multiply_add >= before.multiply_add > 0 and peak.product >= before.product > 0
    assert all(peak.streams[size] >= before.streams[size] > 0 for size in roofline.STREAMS)


def test_who_beats_a_bound_shows_its_error():
    times = {name: measure.summary([seconds, seconds]) for name, seconds in (("fastmeta", 1e-3), ("peer", 3e-3))}
    case = {
        "name": "work", "contenders": {**times, "yardstick": times["fastmeta"]}, "same_work": ["fastmeta", "peer"],
        "work": {"flops": 2e8, "nbytes": 0}, "ratios": {"peer": 3.0, "yardstick": 1.0}, "bars": {}, "at_most": {},
    }  # fmt: skip
    command.add_bounds([case], roofline.Peak("cpu", multiply_add=100, streams={1: 1}))
    assert case["bound"]["ms"] == pytest.approx(2) and case["below_bound"] == ["fastmeta"]
    ours, peer, yardstick = (row[-1] for row in command.rows([case]))
    assert ours == "ERROR in the bound: beats 2.000, arithmetic" and peer == yardstick == ""
    report = {"date": "", "command": "", "machine": roofline.machine(), "peak_in_words": "", "cases": [case]}
    assert "**Error in the bound, beaten by a contender: work.**" in command.markdown(report)
    command.add_bounds([case], roofline.Peak("cpu", multiply_add=1000, streams={1: 1}))
    assert case["below_bound"] == [] and "Error" not in command.markdown(report)


def test_report(tmp_path):
    app = typer.Typer()
    app.command()(command.main)
    result = CliRunner().invoke(
        app, ["--group", "functional_mlp", "--seconds", "0.1", "--out", str(tmp_path), "--device", DEVICE]
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "suite.json").read_text())
    case = report["cases"][0]
    assert set(case["contenders"]) == {"fastmeta", "baddbmm chain"}
    assert case["ratios"]["baddbmm chain"] > 0 and case["bound"]["ms"] > 0
    assert "| functional_mlp fwd T1000-B20-1x40x40x1 | fastmeta |" in (tmp_path / "suite.md").read_text()


# convolutional inner loops ----------------------------------------------------------------------------------------
ROWS_OF_CONV = ("conv4-84-k5-t4", "resnet12-first-order", "protonet")


def test_convolutional_rows(tmp_path):
    """Three rows at tiny sizes, every peer that needs no compiler; their gradients are compared in float64."""
    app = typer.Typer()
    app.command()(conv_command.main)
    rows = [word for row in ROWS_OF_CONV for word in ("--rows", row)]
    options = ["--small", "--seconds", "0.01", "--without", "JAX", "--without", "compile", "--device", DEVICE]
    result = CliRunner().invoke(app, [*rows, *options, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    found = {row["key"]: row for row in json.loads((tmp_path / "conv.json").read_text())["rows"]}
    assert tuple(found) == ROWS_OF_CONV
    images = found["conv4-84-k5-t4"]
    assert {"grouped convolution", "unfold + bmm", "torch.func vmap of the forward"} <= set(images["contenders"])
    assert max(images["distance"].values()) < 1e-3  # float32, of everybody who adapts
    assert "unfold + bmm" in images["distance"]
    assert images["skipped"]["JAX jit, vmap"] == "left out" and images["supervised"]["bar"] == 1.7
    assert images["peer"]["met"] == (images["peer"]["ratio"] >= 1.8)
    assert "fastmeta.accelerate, vmap(grad)" in images["contenders"]
    assert "supervised" not in found["protonet"]
    text = (tmp_path / "conv.md").read_text()
    assert all(row["title"] in text for row in found.values())


def of_wrong(build):
    """As `build`, but for the last number of the last gradient."""

    def wrong(problem):
        def run():
            *others, last = build(problem)()
            return [*others, last + torch.eye(1, last.numel(), dtype=last.dtype, device=last.device).view(last.shape)]

        return run

    return wrong


def test_wrong_gradients_are_not_timed(monkeypatch):
    row = conv_rows.ROWS["sensors"]
    loop = row.peers["task loop"]
    peers = {"task loop": loop, "wrong": of_wrong(loop), "right": loop}
    options = dict(device=DEVICE, dtype=torch.float32, seconds=0.0, small=True, without=lambda name: False)
    monkeypatch.setitem(conv_rows.ROWS, "sensors", dataclasses.replace(row, peers=peers))
    found = conv_run.run_row("sensors", **options)
    assert list(found["skipped"]) == ["wrong"] and "differs from task loop" in found["skipped"]["wrong"]
    assert {"right", "fastmeta.accelerate, vmap(grad)"} <= set(found["contenders"])
    assert found["peer"]["name"] == "task loop" and found["supervised"]["bar"] is None
    monkeypatch.setitem(conv_rows.ROWS, "sensors", dataclasses.replace(row, ours=of_wrong(row.ours)))
    with pytest.raises(AssertionError, match=r"fastmeta, result \d+ differs"):
        conv_run.run_row("sensors", **options)


def test_convolutions_in_jax_are_equal():
    pytest.importorskip("jax")
    whole = conv_problem.conv4(Make(torch.float64), True, shots=1, steps=1, tasks=2)
    block = conv_problem.in_one_row(whole.model)[:4]  # XLA compiles all four for long
    head = torch.nn.Linear(6 * 8 * 8, 5, dtype=torch.float64)
    one = dataclasses.replace(whole, model=torch.nn.Sequential(*block, torch.nn.Flatten(), head))
    loop = conv_rows.LOOPS["task loop, contiguous"]
    measure.check_equal({"loop": loop(one), "JAX": conv_rows._jax(one, mapped=True)}, 1e-9)


def test_peak_memory_of_convolutions(monkeypatch):
    """The runs that stand in processes of their own otherwise."""

    def here(command, **_):
        name, steps, *rest = command[3:]
        megabytes = conv_memory.measure(name, min(int(steps), 6), rest == ["small"])
        return SimpleNamespace(stdout=json.dumps(max(megabytes, 0.0)))

    monkeypatch.setattr(conv_memory.subprocess, "run", here)
    found = conv_memory.report(small=True)
    assert [(run["contender"], run["steps"]) for run in found["runs"]] == list(conv_memory.RUNS)
    assert conv_report.memory(found)[0].startswith("Conv4-64 28x28x1 1-shot T4: the least peak memory is ")


def row_of(key, ours, peer):
    times = {"fastmeta": {"median_ms": ours}, "loop": {"median_ms": peer}}
    against = {"name": "loop", "ratio": peer / ours, "bar": 1.5, "met": peer / ours >= 1.5}
    return {"key": key, "title": f"row {key}", "dtype": "float32", "small": False, "engine": None, "contenders": times,
            "one_call_ms": {}, "skipped": {"slow": "why | not"}, "peer": against}  # fmt: skip


def test_page_of_convolutions(tmp_path, monkeypatch):
    head = {"date": "", "command": "", "machine": roofline.machine()}
    before = {**head, "rows": [row_of("a", 9.0, 9.0), row_of("b", 2.0, 1.0)], "memory": None}
    now = conv_report.merged({**head, "rows": [row_of("a", 1.0, 2.0)]}, before)
    assert [row["key"] for row in now["rows"]] == ["a", "b"] and now["rows"][0]["peer"]["met"]
    elsewhere = conv_report.merged({**head, "machine": {}, "rows": []}, before)
    assert elsewhere["rows"] == []
    page = tmp_path / "conv.md"
    page.write_text(f"above\n{conv_report.BEGIN}\nold\n{conv_report.END}\nbelow\n")
    monkeypatch.setattr(conv_report, "PAGE", page)
    conv_report.write_page(now)
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "old" not in text
    assert "| row a | 1.0 | loop | 2.00 (>= 1.5) |  |  |" in text
    assert "| row b | 2.0 | loop | 0.50 (MISSED >= 1.5) |  |  |" in text
    assert "- row b: loop, 2.00 times as fast as fastmeta." in text and "| slow |  | why / not |" in text


# what runs on a GPU -----------------------------------------------------------------------------------------------
GPU_CHECK = Path(__file__).parent.parent / "benchmarks" / "gpu_check.sh"


def dry_run(steps):
    """Status, and by step the words of its command."""
    environment = {**os.environ, "DRY": "1", "STEPS": steps, "OUT": "folder of results", "PYTHON": "python"}
    done = subprocess.run(["bash", GPU_CHECK], env=environment, capture_output=True, text=True)
    lines = (line.removeprefix("== ").split(": ", 1) for line in done.stdout.splitlines())
    return done.returncode, {name: shlex.split(command) for name, command in lines}


def test_steps_of_the_gpu_check():
    status, steps = dry_run("")
    assert status == 0
    assert {name.split("-")[0] for name in steps} == {"build", "info", "tests", "sanitizer", "benchmarks", "conv"}
    assert dry_run("build convv") == (2, {})
    status, steps = dry_run("build conv")
    assert status == 0 and list(steps) == ["build", "conv-tests", "conv-benchmarks"]
    ops = re.search(r"\((.*?)\) and \(cuda or triton\)", steps["conv-tests"][-1])[1].split(" or ")
    chosen = {name for name in REGISTRY if any(part in name for part in ops)}
    family = "task_conv2d", "norm_moments", "norm_act_pool"
    assert chosen == {name for name in REGISTRY if name.startswith(family)} and len(chosen) == 7
    entry = typer.Typer()
    entry.command()(conv_command.main)
    assert steps["conv-benchmarks"][2:5] == ["python", "-m", "benchmarks.conv"]
    given = typer.main.get_command(entry).make_context("conv", steps["conv-benchmarks"][5:]).params
    assert given["dtype"] == ["float32", "bfloat16"] and set(given["rows"]) <= set(conv_command.NAMES)
    assert str(given["out"]) == "folder of results"
