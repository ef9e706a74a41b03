"""Which checkpoints a folder keeps, and what is whole and yet does not fit a run: named, refused, passed over."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from small_runs import posix, put, sinusoid, trained

from fastmeta.training import (
    CheckpointError,
    CheckpointFolder,
    load,
)
from fastmeta.training.checkpoint import _fingerprint
from fastmeta.training.run import build_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


# ----- what is kept


def test_what_is_written_is_not_pruned_though_later_steps_are_there(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step, score in ((100, 0.9), (300, 0.5), (400, 0.4)):
        put(folder, step, score=score)
    for step in (300, 400):
        folder.path(step).with_suffix(".safetensors").write_bytes(b"")
    checkpoint, complaints = folder.newest(fall_back=True)
    assert checkpoint.step == 100 and len(complaints) == 2
    put(folder, 199)
    assert folder.steps() == [100, 199, 400] and folder.newest()[0].step == 199  # the newest written, and whole
    put(folder, 299)
    assert folder.steps() == [100, 199, 299] and folder.best().step == 100
    assert not list(tmp_path.glob("step-00000[34]*"))


def test_a_damaged_record_is_newest_by_its_step(tmp_path):
    folder = CheckpointFolder(tmp_path)
    put(folder, 1, 2, 3)
    folder.path(3).write_text("{")
    with pytest.raises(CheckpointError, match="step-00000003.json: damaged"):
        folder.newest()
    assert folder.newest(fall_back=True)[0].step == 2
    put(folder, 4)
    assert folder.newest()[0].step == 4
    assert folder.path(3).exists()  # whose it was is not known


def test_checkpoints_of_before_are_in_the_order_of_their_steps(tmp_path):
    folder = CheckpointFolder(tmp_path)
    put(folder, 2, 1)
    assert folder.newest()[0].step == 1
    for step in (1, 2):
        rewrite(folder, step, lambda tensors, record: [record.pop("saves"), record.pop("run")])
    assert folder.newest()[0].step == 2
    put(folder, 1)
    assert folder.newest()[0].step == 1


def test_the_same_step_again_replaces_the_record_alone(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path)
    put(folder, 1)
    before = folder.path(1).with_suffix(".safetensors").stat().st_mtime_ns
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: pytest.fail("nothing is to be removed"))
    put(folder, 1, score=2.0)
    assert folder.path(1).with_suffix(".safetensors").stat().st_mtime_ns == before
    assert folder.best().record["score"] == 2.0


def test_files_of_the_user_stay(tmp_path):
    own = {"w": torch.ones(2)}
    for name in ("step-final", "step-00000001", "step-00000005", "step-00000005-2", "step-7"):
        save_file(own, tmp_path / f"{name}.safetensors")
    (tmp_path / ".step-notes.tmp").write_text("mine")
    theirs = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    folder = CheckpointFolder(tmp_path)
    put(folder, 5, 6)
    # what a crash leaves
    (tmp_path / ".step-00000004.json.77.tmp").touch()
    shutil.copy(folder.path(6).with_suffix(".safetensors"), tmp_path / "step-00000006-2.safetensors")
    shutil.copy(folder.path(6).with_suffix(".safetensors"), tmp_path / "step-00000003.safetensors")  # a copy: whose?
    assert folder.load(5).path.exists() and folder.load(5).record["tensors"]["file"] == "step-00000005-3.safetensors"
    put(folder, 7, 8)
    assert {name: (tmp_path / name).read_bytes() for name in theirs} == theirs
    left = {path.name for path in tmp_path.iterdir()} - theirs.keys()
    written = {f"step-0000000{step}.{kind}" for step in (7, 8) for kind in ("json", "safetensors")}
    assert left == written | {"step-00000003.safetensors"}


# ----- whole, and yet not fit


def rewrite(folder, step, change):
    """Change a checkpoint so that all its checksums hold."""
    found = folder.load(step)
    tensors, record = dict(found.tensors), json.loads(found.path.read_text())
    change(tensors, record)
    data = save(tensors)
    if isinstance(record.get("tensors"), dict):
        record["tensors"] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        found.path.with_suffix(".safetensors").write_bytes(data)
    record["sha256"] = _fingerprint(record)
    found.path.write_text(json.dumps(record))


def without(name):
    return lambda tensors, record: (tensors if "/" in name else record).pop(name)


def changed(name, how):
    def change(tensors, record):
        held = tensors if "/" in name else record
        held[name] = how(held[name])

    return change


def first_not(value):
    return lambda t: torch.cat([torch.full_like(t.flatten()[:1], value), t.flatten()[1:]]).reshape(t.shape)


UNFIT = {
    "weight missing": (without("model/model.1.weight"), "model.1.weight"),
    "weight of another shape": (changed("model/model.1.weight", lambda t: t[:3]), "model.1.weight"),
    "weight of another dtype": (changed("model/model.3.bias", torch.Tensor.double), "model/model.3.bias is float64"),
    "NaN weight": (changed("model/model.3.bias", first_not(math.nan)), "model/model.3.bias has values that are not"),
    "moment missing": (without("optimizer/1/exp_avg"), "optimizer/1/exp_avg is missing"),
    "moments of a parameter missing": (
        lambda tensors, _: [tensors.pop(f"optimizer/1/{key}") for key in ("step", "exp_avg", "exp_avg_sq")],
        "optimizer/1/exp_avg is missing",
    ),
    "moment of another shape": (changed("optimizer/0/exp_avg_sq", lambda t: t.flatten()), "optimizer/0/exp_avg_sq has"),
    "moment of another dtype": (changed("optimizer/0/exp_avg", torch.Tensor.half), "optimizer/0/exp_avg is float16"),
    "infinite moment": (changed("optimizer/0/exp_avg", first_not(math.inf)), "optimizer/0/exp_avg has values"),
    "moment missing where none are listed": (
        lambda tensors, record: [tensors.pop("optimizer/1/exp_avg"), record["optimizer"].pop("tensors")],
        "optimizer/1/exp_avg is missing",
    ),
    "moment of no parameter": (
        lambda tensors, _: tensors.update({"optimizer/9/exp_avg": torch.ones(1)}), "optimizer/9/exp_avg is of nothing"
    ),
    "Adam without a rate": (changed("optimizer", lambda o: {**o, "groups": [{}]}), r"optimizer.groups\[0\].lr"),
    "no optimizer": (without("optimizer"), "optimizer is missing"),
    "short random state": (changed("rng/cpu", lambda t: t[:100]), "rng/cpu is no state"),
    "short state of the sampler": (changed("rng/sampler", lambda t: t[:16]), "rng/sampler is no state"),
    "no random state": (without("rng/sampler"), "rng/sampler is missing"),
    "no time": (without("seconds"), "seconds is missing"),
    "no number for the time": (changed("seconds", lambda _: "long"), "seconds must be float, got 'long'"),
    "no list of validations": (changed("history", lambda _: {}), "history must be list"),
    "a validation of no step": (changed("history", lambda _: [{}]), r"history\[0\] has no step"),
    "no settings": (without("config"), "config: no settings"),
    "settings that are none": (changed("config", lambda _: []), "config: no settings"),
    "no numbers of the tensors": (changed("tensors", lambda _: 5), "tensors must be dict, got 5"),
    "tensors elsewhere": (changed("tensors", lambda t: {**t, "file": "../x"}), "tensors.file must be a name"),
    "a score that is none": (changed("score", lambda _: "best"), "score must be float, got 'best'"),
    "another step": (changed("step", lambda _: 7), "the checkpoint of step 7, put under another one's name"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trained(folder)
    return folder


@pytest.mark.parametrize("what", UNFIT)
def test_what_does_not_fit_is_named_and_the_older_one_taken(tmp_path, whole, what):
    change, text = UNFIT[what]
    folder = CheckpointFolder(shutil.copytree(whole, tmp_path / "run"))
    rewrite(folder, 20, change)

    def begin(checkpoint):
        from fastmeta.training.run import config_of

        return build_trainer(config_of(checkpoint), folder.folder, resume=checkpoint)

    with pytest.raises(CheckpointError, match=text) as error:
        folder.newest(use=begin)
    assert "step-00000020" in str(error.value) and "\n" not in str(error.value)
    trainer, complaints = folder.newest(fall_back=True, use=begin)
    assert trainer.step == 15 and len(complaints) == 1
    trainer.run()
    assert folder.newest(use=begin)[0].step == 20


def test_a_checkpoint_of_before_fits(tmp_path, whole):
    folder = CheckpointFolder(shutil.copytree(whole, tmp_path / "run"))

    def older(_, record):
        del record["optimizer"]["tensors"], record["run"], record["saves"], record["skipped"]

    rewrite(folder, 20, older)
    trainer = build_trainer(sinusoid(iterations=21), folder.folder, resume=folder.load(20))
    assert trainer.step == 20 and trainer.run() is None


def test_inputs_that_are_none_are_named(tmp_path, whole):
    folder = CheckpointFolder(shutil.copytree(whole, tmp_path / "run"))
    rewrite(folder, 20, changed("inputs", lambda _: {"kind": "regression"}))
    with pytest.raises(CheckpointError, match="step-00000020.json: inputs: "):
        load(folder.folder, newest=True)


def test_deep_nesting_is_damage(tmp_path):
    folder = CheckpointFolder(tmp_path)
    put(folder, 1, 2)
    folder.path(2).write_text('{"format": 1, "a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(CheckpointError, match="step-00000002.json: damaged, JSON that is nested too deeply"):
        folder.newest()
    assert folder.newest(fall_back=True)[0].step == 1


def test_weights_that_are_not_finite_are_no_learner(tmp_path, whole):
    folder = CheckpointFolder(shutil.copytree(whole, tmp_path / "run"))
    rewrite(folder, 20, changed("model/model.1.weight", first_not(math.nan)))
    with pytest.raises(CheckpointError, match=r"step-00000020.json: model/model.1.weight has values that are not"):
        load(folder.folder, newest=True)


@posix
def test_a_checkpoint_of_another_run_is_noticed(tmp_path, whole, run):
    folder = CheckpointFolder(shutil.copytree(whole, tmp_path / "run"))
    trained(tmp_path / "other", seed=1)
    for kind in ("json", "safetensors"):
        shutil.copy(tmp_path / "other" / f"step-00000020.{kind}", folder.folder)
    resume = ["train", "--resume", "--out", folder.folder, "--iterations", 21, "--no-report"]
    with pytest.raises(CheckpointError, match="another run"):
        folder.best()  # the newest, as no other was validated
    _, stderr = run(*resume, code=2)
    assert "step-00000020.json: a checkpoint of another run than the one in this folder. --fall-back goes on" in stderr
    assert stderr.count("\n") == 1
    stdout, stderr = run(*resume, "--fall-back")
    assert "warning: passed over" in stderr and "at step 15" in stdout
    assert folder.newest()[0].step == 21 and folder.newest()[0].record["config"]["seed"] == 0
    # a run that was copied without its lock, or whose lock was deleted, is itself
    folder.lock.path.unlink()
    run(*resume[:-2], 22, "--no-report")
    assert folder.newest()[0].step == 22 and folder.load(21).step == 21
    run(*resume[:-2], 23, "--no-report")
