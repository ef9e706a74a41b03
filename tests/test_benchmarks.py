"""The benchmark suite runs, compares equal work, and reports; its figures mean nothing here."""

import dataclasses
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from conftest import DEVICE
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from benchmarks import counts, measure, plots, report, roofline, suite
from benchmarks import run as timing
from benchmarks.case import Case
from benchmarks.compare import compare
from benchmarks.conv import __main__ as conv_command
from benchmarks.conv import memory as conv_memory
from benchmarks.conv import problem as conv_problem
from benchmarks.conv import report as conv_report
from benchmarks.conv import rows as conv_rows
from benchmarks.conv import run as conv_run
from fastmeta import MAML
from fastmeta.cli.main import app
from fastmeta.dispatch.spec import REGISTRY, Make


def test_unlike_work_is_refused():
    with pytest.raises(AssertionError, match="b, result 0 differs from a"):
        measure.check_equal({"a": lambda: torch.ones(3), "b": lambda: torch.zeros(3)})


@pytest.fixture
def libraries(monkeypatch):
    """Contenders of libraries that are not installed run with `fastmeta.compat`, which has their names and numbers."""
    for name in ("learn2learn", "torchopt"):
        if importlib.util.find_spec(name) is None:
            monkeypatch.setitem(sys.modules, name, importlib.import_module(f"fastmeta.compat.{name}"))


def runnable(contenders):
    needs = {"KeOps": "pykeops", "JAX jit": "jax", "higher": "higher"}
    return {name: run for name, run in contenders.items() if importlib.util.find_spec(needs.get(name, "torch"))}


@pytest.mark.parametrize(
    "group",
    [
        "functional_mlp", "protonet", "task_weights", "maml", "task_conv2d", "norm_act_pool", "meta_sgd",
        "hypernetwork", "in_context",
    ],
)  # fmt: skip
def test_contenders_of_a_group_agree(group, libraries):
    for case in suite.GROUPS[group](Make(torch.float32, DEVICE)):
        # a loop over a thousand tasks takes too long here, and so do products of large convolutions
        if not any(size in case.name for size in ("T1000", "14x14x64-O", "42x42x32-O", "28x28x64-b")):
            measure.check_equal(runnable(case.contenders))


def test_curves_agree_where_they_begin(libraries):
    largest = {}
    for case in suite.GROUPS["curves"](Make(torch.float32, DEVICE)):
        curve, what, size = case.point
        if (curve, what) not in largest:
            measure.check_equal(runnable(case.contenders))
        largest[curve, what] = size
    assert sorted(largest.values()) == [100, 512, 16_384, 100_000]


def test_drawn_tasks_have_the_same_shapes():
    for case in suite.GROUPS["sampling"](Make(torch.float32, DEVICE)):
        ours, loop = case.contenders["fastmeta"](), case.yardsticks["task loop"]()
        assert [(t.shape, t.dtype) for t in ours] == [(t.shape, t.dtype) for t in loop], case.name


def test_every_training_step_moves_its_own_net():
    for case in suite.GROUPS["training_step"](Make(torch.float32, DEVICE)):
        for name, run in {**case.contenders, **case.yardsticks}.items():
            before = run().detach().clone()
            assert not torch.equal(run(), before), f"{case.name}: {name}"


def test_every_contender_can_be_named():
    named = set()
    for group in suite.GROUPS.values():
        for case in group(Make(torch.float32)):
            assert next(iter(case.contenders)) == "fastmeta"
            assert set(case.bars) <= set(case.contenders) and set(case.at_most) <= set(case.yardsticks)
            named |= {*case.contenders, *case.yardsticks, *case.absent}
    assert set(suite.PEERS) == named - {"fastmeta"} and len(suite.PEERS) == len(set(suite.PEERS))


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


def test_without_a_compiler_torch_itself_is_looked_at(monkeypatch):
    def missing():
        raise FileNotFoundError("c++")

    monkeypatch.setattr(roofline, "_native_works", missing)
    monkeypatch.setattr(roofline, "PRODUCTS", ((64, 64, 64),))
    monkeypatch.setattr(roofline, "STREAMS", (2**15,))
    peak = roofline.Peak("cpu", dtype=torch.float64)
    peak.look(rounds=1)
    assert peak.multiply_add == 0 and peak.product > 0 and peak.streams[2**15] > 0


def test_who_beats_a_bound_shows_its_error():
    times = {name: measure.summary([seconds, seconds]) for name, seconds in (("fastmeta", 1e-3), ("peer", 3e-3))}
    case = {
        "name": "work", "contenders": {**times, "yardstick": times["fastmeta"]}, "same_work": ["fastmeta", "peer"],
        "work": {"flops": 2e8, "nbytes": 0}, "ratios": {"peer": 3.0, "yardstick": 1.0}, "bars": {}, "at_most": {},
    }  # fmt: skip
    case |= {"absent": {}, "unlike": []}
    timing.add_bounds([case], roofline.Peak("cpu", multiply_add=100, streams={1: 1}))
    assert case["bound"]["ms"] == pytest.approx(2) and case["below_bound"] == ["fastmeta"]
    ours, peer, yardstick = (row[-1] for row in report.rows([case]))
    assert ours == "ERROR in the bound: beats 2.000, arithmetic" and peer == yardstick == ""
    found = {"date": "", "command": "", "machine": roofline.machine(), "peak_in_words": "", "cases": [case]}
    found |= {"device": "cpu", "dtype": "float32", "seconds": 0, "complete": True}
    assert "**Error in the bound, beaten by a contender: work.**" in report.markdown(found)
    timing.add_bounds([case], roofline.Peak("cpu", multiply_add=1000, streams={1: 1}))
    assert case["below_bound"] == [] and "Error" not in report.markdown(found)


# the command --------------------------------------------------------------------------------------------------------
def bench(*words):
    return CliRunner().invoke(app, ["bench", "--device", DEVICE, *words])


@pytest.fixture
def tiny(monkeypatch):
    """A suite of two workloads in a group of its own, and nothing of the machine looked at."""
    from fastmeta.benchmarks import run, suite
    from fastmeta.benchmarks.roofline import Peak

    monkeypatch.setattr(run, "gate", lambda device: None)
    monkeypatch.setattr(Peak, "look", lambda peak: peak.__dict__.update(product=100.0, streams={2**20: 10.0}))
    cases = [sums(10, "tasks", 10), sums(1000, "tasks", 1000)]
    monkeypatch.setitem(suite.GROUPS, "tiny", lambda make: iter(cases))
    monkeypatch.setattr(suite, "PEERS", (*suite.PEERS, "loop", "wrong", "missing", "failing"))
    return cases


def sums(n, what, size):
    x = torch.arange(float(n))
    contenders = {"fastmeta": lambda: x.sum(), "loop": lambda: sum(x.unbind()), "failing": lambda: x @ x[1:]}
    contenders |= {"wrong": lambda: x.sum() + 1, "missing": lambda: __import__("nobody_has_this")}
    point = "sum", what, size
    return Case(f"sum of {n}", contenders, n, 4 * n, {"loop": 1.0}, absent={"far": "too far"}, point=point)


def test_bench_writes_a_folder_of_results(tmp_path, tiny):
    done = bench("--group", "tiny", "--seconds", "0.001", "--out", str(tmp_path))
    assert done.exit_code == 1 and "other numbers than fastmeta's: wrong in sum of 10" in done.stderr.replace("\n", " ")
    assert "not timed: missing: nobody_has_this is not installed: pip install nobody_has_this" in done.stderr
    assert "not timed: far: too far (sum of 10 and 1 more)" in done.stderr and "sum of 1000" in done.stdout
    assert "failing: RuntimeError" in done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["complete"] and found["command"] == f"fastmeta bench --group tiny{gpu()} --seconds 0.001"
    assert found["environment"]["versions"]["torch"] == torch.__version__ and found["environment"]["cores"] >= 1
    case = found["cases"][0]
    assert case["group"] == "tiny" and case["same_work"] == ["fastmeta", "loop"]
    assert case["ratios"]["loop"] > 0 and case["bound"]["ms"] > 0
    page = (tmp_path / "report.md").read_text()
    assert "| sum of 10 | fastmeta |" in page and "- far: too far" in page and "Other numbers" in page
    for name in ("ratios", "scaling", "ceilings"):
        assert f"({name}.png)" in page and (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def gpu():
    return "" if DEVICE == "cpu" else f" --device {DEVICE}"


def test_bench_takes_whom_it_is_told(tmp_path, tiny):
    done = bench("--group", "tiny", "--against", "loo", "--seconds", "0.001", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    case = json.loads((tmp_path / "results.json").read_text())["cases"][1]
    assert set(case["contenders"]) == {"fastmeta", "loop"} and set(case["absent"]) == {"far"}
    for option, wrong, known in (("--group", "tinny", "maml_conv"), ("--against", "nobody", "JAX jit")):
        refused = bench("--group", "tiny", option, wrong).exception
        assert isinstance(refused, ValueError) and wrong in str(refused) and known in str(refused)
    assert "bfloat16" in str(bench("--dtype", "int8").exception)


def test_quick_leaves_out_what_takes_long(tmp_path, tiny, monkeypatch):
    slow = dataclasses.replace(tiny[0], name="slow", quick=False)
    fast = dataclasses.replace(tiny[0], contenders={**tiny[0].contenders, "loop, compiled": None})
    tiny[:] = [slow, fast]
    bench("--group", "tiny", "--quick", "--out", str(tmp_path))
    (case,) = json.loads((tmp_path / "results.json").read_text())["cases"]
    assert case["name"] == "sum of 10" and "--quick" in case["absent"]["loop, compiled"]


def test_ctrl_c_keeps_what_is_done(tmp_path, tiny):
    def interrupted():
        raise KeyboardInterrupt

    tiny[1] = dataclasses.replace(tiny[1], contenders={"fastmeta": interrupted})
    done = bench("--group", "tiny", "--seconds", "0.001", "--out", str(tmp_path))
    assert done.exit_code == 130 and "sum of 10" in done.stdout and "interrupted" in done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert [case["name"] for case in found["cases"]] == ["sum of 10"] and not found["complete"]
    assert "Interrupted" in (tmp_path / "report.md").read_text()


def test_pictures_need_matplotlib_and_results_do_not(tmp_path, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = bench("--group", "tiny", "--against", "loop", "--seconds", "0.001", "--out", str(tmp_path))
    assert done.exit_code == 0 and "matplotlib is not installed" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.md"}


def test_nothing_to_draw():
    assert plots.ratios({"cases": []}) is plots.scaling({"cases": []}) is plots.ceilings({"cases": []}) is None


# two runs -----------------------------------------------------------------------------------------------------------
def of_run(ours, peer, spread=0.0, **more):
    def times(ms):
        return {"median_ms": ms, "p25_ms": ms * (1 - spread / 2), "p75_ms": ms * (1 + spread / 2)}

    cases = [{"name": "work", "contenders": {"fastmeta": times(ours), "peer": times(peer)}}]
    return {"device": "cpu", "dtype": "float32", "machine": {"torch": "2"}, "cases": cases, **more}


@pytest.mark.parametrize(
    "before, now, slower",
    [
        (of_run(1.0, 5.0), of_run(1.05, 5.0), False),  # a tenth is nobody's fault
        (of_run(1.0, 5.0), of_run(1.2, 5.0), True),
        (of_run(1.0, 5.0), of_run(1.2, 5.0, spread=0.2), False),
        (of_run(1.0, 5.0), of_run(2.0, 10.0), False),  # the machine is slower
        (of_run(1.0, 5.0), of_run(1.0, 2.5), True),  # it is faster, and ours is not
        (of_run(1.0, 5.0), of_run(2.0, 10.0, machine={"torch": "3"}), True),  # the peer is another
    ],
)
def test_a_row_is_slower_beyond_the_spread_and_the_machine(before, now, slower):
    (change,) = compare(now, before)
    assert change.slower == slower and change.before_ms == 1.0


def test_runs_that_cannot_be_compared():
    with pytest.raises(ValueError, match="dtype float32, the other one of float64"):
        compare(of_run(1, 1), of_run(1, 1, dtype="float64"))
    with pytest.raises(ValueError, match="no workload in common"):
        compare(of_run(1, 1), of_run(1, 1, cases=[]))


def test_bench_compares(tmp_path, tiny):
    words = "--group", "tiny", "--against", "loop", "--seconds", "0.001"
    bench(*words, "--out", str(tmp_path))
    file = tmp_path / "results.json"
    before = json.loads(file.read_text())
    for case in before["cases"]:
        for name in ("median_ms", "p25_ms", "p75_ms"):
            case["contenders"]["fastmeta"][name] *= 1e-3
    file.write_text(json.dumps({**before, "machine": {**before["machine"], "cpu": "another"}}))
    done = bench(*words, "--compare", str(file))
    assert done.exit_code == 1 and "SLOWER" in done.stdout and "another machine" in done.stderr
    file.write_text("[]")
    assert "holds no results" in str(bench(*words, "--compare", str(file)).exception)


# convolutional inner loops ----------------------------------------------------------------------------------------
ROWS_OF_CONV = ("conv4-84-k5-t4", "resnet12-first-order", "protonet")


def test_convolutional_rows(tmp_path):
    """Three rows at tiny sizes, every peer that needs no compiler; their gradients are compared in float64."""
    alone = typer.Typer()
    alone.command()(conv_command.main)
    rows = [word for row in ROWS_OF_CONV for word in ("--rows", row)]
    options = ["--small", "--seconds", "0.01", "--without", "JAX", "--without", "compile", "--device", DEVICE]
    result = CliRunner().invoke(alone, [*rows, *options, "--out", str(tmp_path)])
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
    assert steps["benchmarks"][:3] == ["python", "-m", "benchmarks"]
    given = typer.main.get_command(app).commands["bench"].make_context("bench", steps["benchmarks"][3:]).params
    assert given["device"] == "cuda" and str(given["out_dir"]) == "folder of results"
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
