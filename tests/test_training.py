"""The training loop and its checkpoints, in one process; the command line around them is in test_cli.py."""

import json
import math
import os

import pytest
import torch
from conftest import DEVICE
from torch import nn

from fastmeta.algorithms import MetaOutput
from fastmeta.cli.options import ALGORITHM_NAMES
from fastmeta.tasks import TaskBatch
from fastmeta.training import (
    CheckpointError,
    CheckpointFolder,
    Estimate,
    NonFiniteError,
    Reporter,
    RunConfig,
    Trainer,
    evaluate,
    load_checkpoint,
    run_config,
)
from fastmeta.training.embed import embedding_pays
from fastmeta.training.metrics import CalibrationError
from fastmeta.training.registry import ALGORITHMS
from fastmeta.training.run import build_tasks, build_trainer, resumed_config
from fastmeta.training.schedule import learning_rate

pytestmark = pytest.mark.usefixtures("few_glyphs", "one_thread")


def sinusoid(**changed):
    return run_config(
        "maml", "sinusoid", **{"task_batch": 4, "iterations": 20, "eval_tasks": 8, "eval_every": 5, **changed}
    )


def glyphs(**changed):
    small = {"train_ways": 3, "ways": 3, "query_shots": 2, "train_query_shots": 2, "hidden": (8,), "eval_tasks": 4}
    return run_config("protonet", "glyphs", **{**small, "iterations": 6, "eval_every": 3, **changed})


def state(trainer):
    optimizer = trainer.optimizer.state_dict()["state"]
    moments = [optimizer[index][key] for index in sorted(optimizer) for key in sorted(optimizer[index])]
    return [*trainer.algorithm.state_dict().values(), *moments, trainer.generator.get_state()]


def same_bits(a, b):
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ----- resuming


@pytest.mark.parametrize(
    "config", [sinusoid(), sinusoid(lr_schedule="cosine"), glyphs()], ids=["maml", "cosine", "protonet"]
)
def test_resume_gives_the_same_bits(tmp_path, config):
    straight = build_trainer(config, None)
    assert straight.run() is None

    halfway = build_trainer(config, tmp_path)
    while halfway.step < config.iterations // 2:
        halfway.train_step()
    halfway.save()

    torch.manual_seed(99)  # a new process has another state of everything
    resumed = build_trainer(config, tmp_path)
    resumed.restore(CheckpointFolder(tmp_path).newest()[0])
    assert resumed.step == config.iterations // 2
    resumed.run()
    assert resumed.step == straight.step
    assert same_bits(state(straight), state(resumed))


def test_validation_does_not_change_training(tmp_path):
    with_validation, without = build_trainer(sinusoid(), None), build_trainer(sinusoid(eval_every=0), None)
    with_validation.run()
    without.run()
    assert same_bits(state(with_validation), state(without))


def test_same_seed_same_bits_other_seed_others():
    first, again, other = (build_trainer(sinusoid(seed=seed, iterations=2), None) for seed in (1, 1, 2))
    for trainer in (first, again, other):
        trainer.run()
    assert same_bits(state(first), state(again))
    assert not same_bits(state(first), state(other))


def test_resume_refuses_another_run(tmp_path):
    trainer = build_trainer(sinusoid(iterations=1), tmp_path)
    trainer.run()
    checkpoint = CheckpointFolder(tmp_path).newest()[0]
    assert resumed_config(checkpoint, {"iterations": 5, "inner_lr": None}).iterations == 5
    with pytest.raises(ValueError, match="inner_lr 0.01 to 0.5"):
        resumed_config(checkpoint, {"inner_lr": 0.5})
    wider = build_trainer(sinusoid(hidden=(41, 41)), None)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        wider.restore(checkpoint)


# ----- checkpoints


def save(folder, *steps, score=None):
    for step in steps:
        folder.save(step, {"model/w": torch.full((3,), float(step))}, {"score": score})


def test_checkpoint_round_trip(tmp_path):
    weight = torch.randn(3, 4).t()  # not contiguous
    tensors = {"model/w": weight, "model/tied": weight, "model/empty": torch.empty(0), "rng/cpu": torch.get_rng_state()}
    path = CheckpointFolder(tmp_path).save(7, tensors, {"score": None, "nested": {"a": [1, 2.5]}})
    for name in (path, path.with_suffix(".safetensors")):
        checkpoint = load_checkpoint(name)
        assert checkpoint.step == 7 and checkpoint.record["nested"] == {"a": [1, 2.5]}
        assert all(torch.equal(checkpoint.tensors[key], value) for key, value in tensors.items())
    assert set(checkpoint.group("model")) == {"w", "tied", "empty"}
    assert sorted(entry.suffix for entry in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_newest_two_and_best_are_kept(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step, score in [(1, 0.1), (2, 0.9), (3, 0.3), (4, 0.4), (5, None)]:
        save(folder, step, score=score)
    assert folder.steps() == [2, 4, 5]
    assert folder.best().step == 2 and folder.newest()[0].step == 5
    assert len(list(tmp_path.iterdir())) == 6


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def alter(path):
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))


@pytest.mark.parametrize(
    ("suffix", "damage", "text"),
    [
        (".safetensors", truncate, "bytes where"),
        (".safetensors", flip, "SHA-256"),
        (".safetensors", lambda path: path.unlink(), "cannot be read"),
        (".json", truncate, "not JSON"),
        (".json", alter, "own SHA-256"),
        (".json", lambda path: path.write_text("{}"), "not a fastmeta checkpoint"),
    ],
)
def test_damage_is_named_and_refused(tmp_path, suffix, damage, text):
    folder = CheckpointFolder(tmp_path)
    save(folder, 1, 2)
    damaged = folder.path(2).with_suffix(suffix)
    damage(damaged)
    with pytest.raises(CheckpointError, match=text) as error:
        folder.newest()
    assert damaged.name in str(error.value)
    checkpoint, complaints = folder.newest(fall_back=True)
    assert checkpoint.step == 1 and len(complaints) == 1 and text in str(complaints[0])


def test_crash_while_saving_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path)
    save(folder, 1)
    replace, calls = os.replace, []

    def crash_at_the_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("os.replace", crash_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        save(folder, 2)
    monkeypatch.undo()
    assert folder.newest()[0].step == 1
    save(folder, 3)
    assert {path.name.split(".")[0] for path in tmp_path.iterdir()} == {"step-00000001", "step-00000003"}


def test_a_folder_without_checkpoints_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        CheckpointFolder(tmp_path / "absent").newest()


# ----- what is not finite


class Fails(nn.Module):
    """Loss and gradient turn bad at one step, in one task or one parameter."""

    def __init__(self, step, what):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
        self.at, self.what, self.seen = step, what, 0

    def forward(self, batch):
        self.seen += 1
        task_loss = (self.a.sum() + self.b.sum()) * torch.ones(4)
        if self.seen == self.at and self.what == "loss":
            task_loss = task_loss * torch.tensor([1, math.nan, 1, math.nan])
        if self.seen == self.at and self.what == "gradient":
            task_loss = task_loss + (self.b - self.b.detach()).abs().sqrt().sum()  # value 0, slope infinite
        return MetaOutput(task_loss.mean(), task_loss)


class NoTasks:
    kind, input_shape, output_size = "regression", (1,), 1

    def sample(self, num_tasks, *, generator=None):
        return TaskBatch(*[torch.zeros(num_tasks, 1, 1)] * 4)


@pytest.mark.parametrize("at_once", [True, False], ids=["checked each step", "checked late"])
@pytest.mark.parametrize(
    ("what", "text"), [("loss", "NaN in tasks 1, 3 of 4"), ("gradient", "not finite in parameter b")]
)
def test_not_finite_stops_with_step_and_cause(tmp_path, what, text, at_once):
    trainer = Trainer(
        Fails(7, what), NoTasks(), task_batch=4, iterations=10, checkpoints=CheckpointFolder(tmp_path), save_every=3
    )
    trainer._check_every_step = at_once
    with pytest.raises(NonFiniteError, match=text) as error:
        trainer.run()
    assert error.value.step == 7
    checkpoint = CheckpointFolder(tmp_path).newest()[0]
    assert checkpoint.step == 6
    assert all(tensor.isfinite().all() for tensor in checkpoint.group("model").values())


# ----- evaluating


def test_norm_is_of_the_mlp():
    config = run_config("maml", "glyphs", model="mlp", norm="batch", hidden=(8, 6))
    layers = list(build_trainer(config, None).algorithm.model)
    norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm1d)]
    assert [norm.num_features for norm in norms] == [8, 6] and norms[0].running_mean is None
    encoder = build_trainer(run_config("protonet", "glyphs", model="mlp", norm="batch", train_ways=5), None)
    assert all(n.running_mean is not None for n in encoder.algorithm.modules() if isinstance(n, nn.BatchNorm1d))
    with pytest.raises(ValueError, match="norm is of model mlp; conv4"):
        run_config("protonet", "glyphs", norm="batch")
    with pytest.raises(ValueError, match="norm must be one of none, batch, layer"):
        run_config("protonet", "glyphs", model="mlp", norm="group")


def test_calibration_error():
    error = CalibrationError(bins=10)
    assert error.read() is None
    # 100 queries at a confidence of 0.75, of which 60 are right; 50 at 0.95, of which 50 are right
    sure = [torch.tensor([p, 1 - p]).log().expand(n, 2) for p, n in ((0.75, 100), (0.95, 50))]
    labels = torch.cat([torch.arange(100) >= 60, torch.arange(50) >= 50]).long()
    error.add(torch.cat(sure)[None], labels[None])
    assert error.read() == pytest.approx((100 * 0.15 + 50 * 0.05) / 150, abs=1e-6)
    # the order of batches does not matter, and certainty that is right is perfect
    parts = CalibrationError(bins=10)
    for part in (slice(50, 150), slice(0, 50)):
        parts.add(torch.cat(sure)[None, part], labels[None, part])
    assert parts.read() == pytest.approx(error.read())
    certain = CalibrationError()
    certain.add(torch.tensor([[[100.0, 0.0]]]), torch.tensor([[0]]))
    assert certain.read() == 0


def test_estimate():
    estimate = Estimate.of(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert estimate.mean == 2.5 and estimate.count == 4
    assert estimate.ci95 == pytest.approx(1.96 * 1.2909944487358056 / 2)
    assert math.isnan(Estimate.of(torch.ones(1)).ci95)
    assert Estimate.of(torch.tensor([math.inf, 1.0])).as_json() == {"mean": None, "ci95": None, "episodes": 2}
    with pytest.raises(ValueError, match="n >= 1"):
        Estimate.of(torch.ones(0))


def test_evaluate_by_step_and_leaves_the_algorithm_as_it_was():
    trainer = build_trainer(sinusoid(), None)
    maml, tasks = trainer.algorithm.train(), trainer.tasks
    result = evaluate(maml, tasks, episodes=7, inner_steps=3, by_step=True, seed=4)
    assert maml.training and maml.inner_steps == 1
    assert len(result.loss_by_step) == 4 and result.loss == result.loss_by_step[3] and result.accuracy is None
    assert result == evaluate(maml, tasks, episodes=7, inner_steps=3, by_step=True, seed=4)
    unadapted = evaluate(maml, tasks, episodes=7, inner_steps=0, seed=4)
    assert unadapted.loss == result.loss_by_step[0]


def test_evaluate_protonet_with_other_ways_than_in_training():
    config = glyphs(train_ways=3, ways=4)
    trainer = build_trainer(config, None)
    result = evaluate(trainer.algorithm, build_tasks(config, "test", trainer.device), episodes=6)
    assert trainer.algorithm.ways == 3
    assert 0 <= result.accuracy.mean <= 1 and result.accuracy.count == 6
    with pytest.raises(ValueError, match="no inner loop"):
        evaluate(trainer.algorithm, trainer.tasks, inner_steps=2)


def test_embedding_once_gives_the_same_accuracy(monkeypatch):
    config = glyphs()
    trainer = build_trainer(config, None)
    trainer.run()
    tasks = build_tasks(config, "test", trainer.device)
    once = evaluate(trainer.algorithm, tasks, episodes=100)
    assert embedding_pays(trainer.algorithm, tasks, 100) and not embedding_pays(trainer.algorithm, tasks, 10)
    monkeypatch.setitem(evaluate.__globals__, "embedding_pays", lambda *_: False)
    each = evaluate(trainer.algorithm, tasks, episodes=100)
    assert once.accuracy == each.accuracy and once.loss.mean == pytest.approx(each.loss.mean, rel=1e-4)


# ----- the loop


def test_reports_and_history(tmp_path):
    heard = []

    class Listener(Reporter):
        def progress(self, progress):
            heard.append(progress)

        def validation(self, step, evaluation, best):
            heard.append((step, best))

    trainer = build_trainer(sinusoid(), tmp_path, (Listener(),))
    trainer.run()
    assert [item[0] for item in heard if type(item) is tuple] == [5, 10, 15, 20]
    assert heard[-1][0] == 20 and heard[-2].step == 20 and heard[-2].loss > 0
    record = json.loads(CheckpointFolder(tmp_path).path(20).read_text())
    assert [row["step"] for row in record["history"]] == [5, 10, 15, 20]
    assert RunConfig.from_json(record["config"]) == sinusoid()


def test_time_budget_ends_a_run():
    trainer = build_trainer(sinusoid(iterations=None, minutes=0.2 / 60, eval_every=0), None)
    trainer.run()
    assert trainer.step > 0 and 0.2 <= trainer.seconds < 20


def test_learning_rates():
    assert [learning_rate(1.0, step, schedule="halve", halve_every=2) for step in range(5)] == [1, 1, 0.5, 0.5, 0.25]
    assert learning_rate(1.0, 50, schedule="cosine", total=100) == pytest.approx(0.5)
    assert learning_rate(1.0, 200, schedule="cosine", total=100) == 0
    with pytest.raises(ValueError, match="one of constant, halve, cosine"):
        learning_rate(1.0, 0, schedule="linear")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"algorithm": "hopfield"}, "algorithm must be one of"),
        ({"algorithm": "protonet"}, "sinusoid is regression"),
        ({"shots": 0}, "shots must be at least 1"),
        ({"inner_lr": -1.0}, "inner_lr must be above 0"),
        ({"model": "conv4", "hidden": (4,)}, "conv4 needs images"),
        ({"lr_schedule": "cosine", "minutes": 1.0}, "cosine' needs iterations"),
        ({"data": "glyphs", "ways": 5, "train_ways": 9}, "train_ways must equal ways"),
        ({"hidden": (4, 0)}, "hidden.1. must be at least 1, got 0"),
    ],
)
def test_settings_are_checked_by_name(given, text):
    with pytest.raises(ValueError, match=text):
        run_config(**{"algorithm": "maml", "data": "sinusoid", **given})


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_registered_algorithm_trains(name):
    entry = ALGORITHMS[name]
    sizes = {"iterations": 1, "eval_every": 0, "task_batch": 2, "device": DEVICE}
    if "regression" in entry.kinds:
        build_trainer(run_config(name, "sinusoid", **sizes), None).run()
    config = run_config(name, "glyphs", ways=3, train_ways=3, model="mlp", hidden=(8, 8), **sizes)
    trainer = build_trainer(config, None)
    trainer.run()
    assert RunConfig.from_json(config.as_json()) == config
    found = evaluate(trainer.algorithm, build_tasks(config, "test", trainer.device), episodes=4)
    assert 0 <= found.accuracy.mean <= 1


@pytest.mark.parametrize("model", ["mlp", "conv4"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_registered_algorithm_adapts_in_inference_mode(name, model):
    hidden = (8,) if model == "conv4" else (8, 8)
    sizes = {"ways": 3, "train_ways": 3, "model": model, "hidden": hidden, "task_batch": 2, "device": DEVICE}
    trainer = build_trainer(run_config(name, "glyphs", iterations=1, **sizes), None)
    algorithm, batch = trainer.algorithm.eval(), trainer.tasks.sample(2)
    with torch.no_grad():
        expected = algorithm(batch).logits
    with torch.inference_mode():
        torch.testing.assert_close(algorithm(batch).logits, expected)
        state = algorithm.adapt(batch.support_x.clone(), batch.support_y)
        torch.testing.assert_close(algorithm.predict(state, batch.query_x), expected)


def test_names_on_the_command_line_are_those_of_the_registry():
    assert tuple(ALGORITHMS) == ALGORITHM_NAMES


def test_settings_are_checked():
    assert dict(run_config("matching", "glyphs", settings=(("full_context", True),)).settings) == {"full_context": True}
    with pytest.raises(ValueError, match="settings of protonet are none; got 'scale'"):
        run_config("protonet", "glyphs", settings=(("scale", 1.0),))
    with pytest.raises(ValueError, match="setting full_context must be bool, got 3"):
        run_config("matching", "glyphs", settings=(("full_context", 3),))
