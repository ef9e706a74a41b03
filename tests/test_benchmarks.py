"""The benchmark suite runs, compares equal work, and reports; its figures mean nothing here."""

import json

import pytest
import torch
from conftest import DEVICE
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks import counts, measure, roofline, suite
from fastmeta import MAML
from fastmeta.dispatch.spec import Make


def test_unlike_work_is_refused():
    with pytest.raises(AssertionError, match="b, result 0 differs from a"):
        measure.check_equal({"a": lambda: torch.ones(3), "b": lambda: torch.zeros(3)})


@pytest.mark.parametrize("group", ["functional_mlp", "protonet", "task_weights", "maml"])
def test_contenders_of_a_group_agree(group):
    for case in suite.GROUPS[group](Make(torch.float32, DEVICE)):
        if "T1000" not in case.name:  # the loop over a thousand tasks takes too long here
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
    assert case["ratios"]["baddbmm chain"] > 0 and case["bound"]["ms"] > 0
    assert "| functional_mlp fwd T1000-B20-1x40x40x1 | fastmeta |" in (tmp_path / "suite.md").read_text()
