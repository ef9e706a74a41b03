"""What `fastmeta tune` found is used, shown, and passed over where it does not hold. Its figures mean nothing here."""

import json
import warnings

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.measure import check_equal
from fastmeta import MAML, TaskBatch
from fastmeta.algorithms import _blocks
from fastmeta.benchmarks import tune as measuring
from fastmeta.cli.main import app
from fastmeta.dispatch import tuned
from fastmeta.nn import mlp

THREADS = str(torch.get_num_threads())


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The file of an empty cache folder, which is read again after `tuned.stored.cache_clear()`."""
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path))
    monkeypatch.setattr(tuned, "_over", [])
    tuned.stored.cache_clear()
    yield tmp_path / "tuned.json"
    tuned.stored.cache_clear()


def put(file, **numbers):
    file.write_text(json.dumps({"machine": tuned.machine(), "threads": {THREADS: numbers}}))
    tuned.stored.cache_clear()


def engine(maml, tasks=2):
    x, y = torch.randn(tasks, 5, 8), torch.arange(5).repeat(tasks, 1)
    return maml.explain(TaskBatch(x, y, x, y)).split(": picked")[0].splitlines()[-1].strip()


def test_numbers_of_the_file_hold_for_as_many_threads(file):
    assert tuned.number("fused", 7) == 7  # no file
    put(file, fused=3.0)
    assert tuned.number("fused", 7) == 3 and tuned.number("lowrank", 1.0) == 1.0
    assert tuned.number("fused", 7, cuda=True) == 7
    with tuned.using({"lowrank": 2.0}):
        assert (tuned.number("fused", 7), tuned.number("lowrank", 1.0)) == (7, 2.0)
    found = json.loads(file.read_text())
    file.write_text(json.dumps({**found, "threads": {str(int(THREADS) + 1): {"fused": 3.0}}}))
    tuned.stored.cache_clear()
    assert tuned.number("fused", 7) == 7


def test_engines_follow_them(file):
    maml = MAML(mlp((8, 32, 5)), inner_steps=1)
    put(file, fused=1e9)
    assert engine(maml) == "fused"
    put(file, fused=0, lowrank=1e9)
    assert engine(maml) == "lowrank"
    put(file, fused=0, lowrank=0)
    assert engine(maml) == "layerwise"


@pytest.mark.parametrize(
    "damage, why",
    [
        (lambda text: text[: len(text) // 2], "damaged"),
        (lambda text: "[]", "damaged"),
        (lambda text: text.replace("3.0}", "NaN}"), "damaged"),
        (lambda text: text.replace(torch.__version__, "1.0"), f"torch is 1.0, here {torch.__version__}"),
        (lambda text: text.replace('"format": 1', '"format": 0'), "format is 0"),
    ],
)
def test_what_does_not_hold_here_is_passed_over_once(file, damage, why):
    put(file, fused=3.0)
    file.write_text(damage(file.read_text()))
    with pytest.warns(UserWarning, match=f"passed over: it.* {why}.*fastmeta tune measures anew".replace("+", r"\+")):
        assert tuned.number("fused", 7) == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.number("fused", 7) == 7


@pytest.mark.parametrize(
    "below, above, number",
    [
        ([1, 2, 4, 8], [2, 3, 3, 3], (4 * 2) ** 0.5),  # beyond the second size the other way is faster
        ([1, 1, 1, 1], [2, 2, 2, 2], 16.0),  # never: twice the largest
        ([2, 2, 2, 2], [1, 1, 1, 1], 0.5),  # always: half the smallest
        ([1, 2, 4, 8], [1.01, 2.01, 3.99, 7.99], 5.0),  # nothing to gain: the built-in one stays
    ],
)
def test_the_number_that_costs_least(below, above, number):
    times = dict(zip((1, 2, 4, 8), zip(below, above, strict=True), strict=True))
    assert measuring.best(5.0, times) == pytest.approx(number)


def first_rung(name):
    return next(iter(measuring.ladders()[name][1]()))


@pytest.mark.parametrize("name", tuned.CHOICES)
def test_the_ways_of_a_rung_do_the_same(name):
    size, below, above = first_rung(name)
    assert size > 0
    check_equal({"below": below, "above": above})


@pytest.mark.parametrize(
    "name, others, says",
    [
        ("mapped", {}, "slower than a loop"),
        ("fused", {}, "outgrow a worker's cache"),
        ("lowrank", {"fused": 0}, "outnumber the layers' mean width"),
    ],
)
def test_the_size_of_a_rung_is_what_the_choice_compares(name, others, says, monkeypatch):
    monkeypatch.setattr(measuring, "_engines", lambda model, below, above, batch: (model, batch))
    size, model, batch = first_rung(name)
    maml = MAML(model, inner_lr=0.01, inner_steps=1)
    for factor, slow in ((0.99, True), (1.01, False)):
        with tuned.using({**others, name: size * factor}):
            assert (says in maml.explain(batch)) == slow


def test_the_size_of_an_encoders_rung_is_what_the_choice_compares(monkeypatch):
    size, below, above = first_rung("one_pass")
    served = []
    run = _blocks._run
    monkeypatch.setattr(_blocks, "_run", lambda norm, follow, x: served.append(x.numel()) or run(norm, follow, x))
    monkeypatch.setattr(_blocks, "_has_kernels", lambda: True)
    above()
    assert max(served) == size


def test_tune_writes_and_reset_takes_away(file, monkeypatch):
    found = measuring.Found("fused", 5.0, 3.0, {1.0: (0.1, 0.2), 2.0: (0.2, 0.1)})
    monkeypatch.setattr("fastmeta.cli.tune.measured", lambda seconds, progress: iter([found]))
    assert "choices" in CliRunner().invoke(app, ["info"]).stdout
    done = CliRunner().invoke(app, ["tune"])
    assert done.exit_code == 0 and str(file) in done.stdout.replace("\n", "") and "200.00" in done.stdout
    assert tuned.number("fused", 7) == 3
    assert "fused 3" in " ".join(CliRunner().invoke(app, ["info"]).stdout.split())
    done = CliRunner().invoke(app, ["tune", "--reset"])
    assert done.exit_code == 0 and not file.exists() and tuned.number("fused", 7) == 7
    assert "not there" in CliRunner().invoke(app, ["tune", "--reset"]).stdout
