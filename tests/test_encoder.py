"""Weights trained before in a run's backbone, runs without a backbone, and a run's learner from its folder."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastmeta
from fastmeta.nn import conv4, mlp
from fastmeta.tasks import Inputs
from fastmeta.training import CheckpointError, load_checkpoint, run_config
from fastmeta.training.encoder import encoder_from, encoder_of, load_encoder
from fastmeta.training.registry import ALGORITHMS
from fastmeta.training.run import build_algorithm, build_trainer, find_checkpoint, load_for_evaluation

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("few_glyphs", "one_thread")


def config(algorithm="protonet", **changed):
    sizes = {"ways": 3, "train_ways": 3, "query_shots": 2, "train_query_shots": 2, "task_batch": 2, "hidden": (8,)}
    defaults = {**sizes, "iterations": 2, "eval_every": 0, "device": "cpu", **changed}
    return run_config(algorithm, "glyphs", **defaults)


def trained(folder, **changed):
    build_trainer(config(**changed), folder).run()
    return folder


def weights(module):
    return {name: p.detach().clone() for name, p in module.state_dict().items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_load_needs_the_folder_alone(tmp_path, monkeypatch):
    run = trained(tmp_path / "run", eval_tasks=2, eval_every=1)
    _, expected, tasks = load_for_evaluation(find_checkpoint(run), "test", device="cpu")
    monkeypatch.setattr("fastmeta.training.run.make_tasks", None)  # the data is gone
    batch = tasks.sample(2)
    for path in (run, find_checkpoint(run).path, str(find_checkpoint(run).path.with_suffix(".safetensors"))):
        learner = fastmeta.load(path, device="cpu")
        assert not learner.training and learner.inputs == Inputs("classification", (1, 28, 28), 3)
        same(weights(learner), weights(expected))
    with torch.no_grad():
        found = learner.predict(learner.adapt(batch.support_x, batch.support_y), batch.query_x)
        state = expected.eval().adapt(batch.support_x, batch.support_y)
        assert torch.equal(found, expected.predict(state, batch.query_x))
        more = torch.arange(6).expand(1, 6)  # more classes than a task of the run had
        assert learner.predict(learner.adapt(torch.rand(1, 6, 1, 28, 28), more), batch.query_x[:1]).shape == (1, 6, 6)
    with pytest.raises(CheckpointError, match="nowhere: no such file or folder"):
        fastmeta.load("nowhere")
    with pytest.raises(TypeError, match="path must be a path, got NoneType"):
        fastmeta.load(None)


def test_load_takes_validations_inner_steps_and_old_runs(tmp_path):
    run = trained(tmp_path / "run", algorithm="maml", model="mlp", inner_steps=1, eval_inner_steps=4)
    learner = fastmeta.load(run, device="cpu")
    assert learner.inner_steps == 4 and learner.config.algorithm == "maml"
    assert all(p.requires_grad for p in learner.parameters())  # what does not require gradients would not adapt
    old = load_checkpoint(find_checkpoint(run).path)
    del old.record["inputs"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / old.record["tensors"]["file"]).write_bytes(old.path.with_suffix(".safetensors").read_bytes())
    from fastmeta.training.checkpoint import _fingerprint

    old.record["sha256"] = _fingerprint(old.record)
    (tmp_path / "old" / old.path.name).write_text(json.dumps(old.record))
    assert fastmeta.load(tmp_path / "old", device="cpu").inputs == learner.inputs


@pytest.mark.parametrize("source", ["protonet", "maml", "plain"])
@pytest.mark.parametrize("model", ["conv4", "mlp"])
def test_weights_go_from_any_file_into_any_backbone(tmp_path, source, model):
    options = {"model": model, "hidden": (8,) if model == "conv4" else (8, 6)}
    if source == "plain":
        file = tmp_path / "encoder.safetensors"
        original = conv4(1, 8) if model == "conv4" else mlp([784, 8, 6])
        save_file({name: t.contiguous() for name, t in original.state_dict().items()}, file)
    else:
        # into a prototypical network a norm's statistics must come along, and MAML keeps none
        folder = trained(tmp_path / "run", algorithm=source, **options)
        file = find_checkpoint(folder).path.with_suffix(".safetensors")
        original = encoder_of(fastmeta.load(folder, device="cpu"))
    targets = ["maml", "protonet"] if (source, model) != ("maml", "conv4") else ["maml"]
    for target in targets:
        learner = build_algorithm(config(target, **options, seed=5), Inputs("classification", (1, 28, 28), 3), CPU)
        fresh = weights(learner)
        load_encoder(learner, file)
        found, expected = dict(encoder_of(learner).named_parameters()), dict(original.named_parameters())
        assert found.keys() == expected.keys() and found
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        if target == "maml":  # the head is left as it was
            kept = [name for name in fresh if torch.equal(fresh[name], weights(learner)[name])]
            head = "model.classifier.weight" if model == "conv4" else "model.5.weight"
            assert [name for name in kept if name.endswith("weight") and fresh[name].dim() == 2] == [head]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: state.pop("encoder.1.0.weight"), "lacks encoder.1.0.weight$"),
        (lambda state: state.update(extra=torch.zeros(1)), "has, and the backbone does not, extra$"),
        (lambda state: state.update({"encoder.0.0.weight": torch.zeros(8, 3, 3, 3)}),
         r"size mismatch for encoder.0.0.weight: .*8, 3, 3, 3.*8, 1, 3, 3"),
        (lambda state: state.clear(), "holds no tensors"),
    ],
    ids=["missing", "unexpected", "shape", "empty"],
)  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, change, text):
    state = {name: t.contiguous() for name, t in conv4(1, 8).state_dict().items()}
    change(state)
    save_file(state, tmp_path / "e.safetensors")
    with pytest.raises(ValueError, match=text):
        build_trainer(config(encoder=str(tmp_path / "e.safetensors")), None)


def test_other_mistakes_with_an_encoder(tmp_path):
    (tmp_path / "no.safetensors").write_bytes(b"no")
    wrong = {"nowhere": "encoder nowhere: no such file", tmp_path / "no.safetensors": "not a safetensors"}
    for path, text in wrong.items():
        with pytest.raises(ValueError, match=text):
            build_trainer(config(encoder=str(path)), None)
    with pytest.raises(ValueError, match="freeze_encoder needs encoder"):
        config(freeze_encoder=True)
    with pytest.raises(ValueError, match="model is 'none'"):
        config("ridge", model="none", hidden=None, encoder="e")


def test_a_frozen_encoder_stays_as_it_is_and_a_run_goes_on_without_the_file(tmp_path):
    file = tmp_path / "e.safetensors"
    encoder = conv4(1, 8)
    for _ in range(3):
        encoder(torch.rand(4, 1, 28, 28))  # statistics of its own
    original = weights(encoder)
    save_file({name: t.contiguous() for name, t in original.items()}, file)
    settings = config("ridge", encoder=str(file), freeze_encoder=True, eval_every=1, eval_tasks=2)
    trainer = build_trainer(settings, tmp_path / "run")
    head = weights(trainer.algorithm)["log_ridge"]
    trainer.run()
    same(weights(trainer.algorithm.encoder), original)
    assert not torch.equal(trainer.algorithm.log_ridge, head)
    file.unlink()
    again = build_trainer(settings, tmp_path / "run", resume=find_checkpoint(tmp_path / "run", newest=True))
    again.iterations = 4
    again.run()
    same(weights(again.algorithm.encoder), original)
    same(weights(fastmeta.load(tmp_path / "run", newest=True, device="cpu").encoder), original)

    save_file({name: t.contiguous() for name, t in original.items()}, file)
    fine = build_trainer(config("ridge", encoder=str(file)), None)
    fine.run()
    assert not torch.equal(weights(fine.algorithm.encoder)["encoder.0.0.weight"], original["encoder.0.0.weight"])


@pytest.mark.parametrize("name", [name for name, entry in ALGORITHMS.items() if entry.without_model])
def test_without_a_model_the_head_alone_trains(name):
    trainer = build_trainer(config(name, model="none", hidden=None, outer_lr=0.1), None)
    before = weights(trainer.algorithm)
    trainer.run()
    assert any(not torch.equal(t, before[key]) for key, t in weights(trainer.algorithm).items())


def test_model_none_says_who_serves_it():
    with pytest.raises(ValueError, match="leaves protonet nothing to train .*; maml, .*ridge.* serve it"):
        config("protonet", model="none", hidden=None)


def test_an_encoder_from_its_file_alone(tmp_path):
    x = torch.rand(3, 1, 28, 28)
    for module in (conv4(1, 4).eval(), mlp([784, 5, 4], norm="layer").eval(), mlp([784, 5]).eval()):
        save_file({name: t.contiguous() for name, t in module.state_dict().items()}, tmp_path / "e.safetensors")
        found, width = encoder_from(tmp_path / "e.safetensors")
        assert torch.equal(found(x), module(x)) and width in (1, 784)
    save_file({"body.w": torch.zeros(2)}, tmp_path / "e.safetensors")
    with pytest.raises(ValueError, match="neither a conv4 nor an mlp .* body.w"):
        encoder_from(tmp_path / "e.safetensors")
    assert load_file(tmp_path / "e.safetensors").keys() == {"body.w"}
