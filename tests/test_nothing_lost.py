"""What a run must not lose: by its own saving, by signals, full disks, other runs in its folder, checkpoints that do
not fit, steps that are not finite. That a killed run loses nothing is tried by `kills.py` at random moments."""

import errno
import hashlib
import importlib
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from fastmeta.algorithms import MetaOutput
from fastmeta.functional import adapt_mlp
from fastmeta.tasks import TaskBatch
from fastmeta.training import (
    CheckpointError,
    CheckpointFolder,
    NonFiniteError,
    Reporter,
    Trainer,
    load,
    run_config,
)
from fastmeta.training.checkpoint import _fingerprint, append
from fastmeta.training.lock import FolderLock
from fastmeta.training.log import LogReporter, read_log
from fastmeta.training.run import build_trainer
from fastmeta.training.signals import StopSignals

posix = pytest.mark.skipif(os.name != "posix", reason="locks and signals as on POSIX")


pytestmark = pytest.mark.usefixtures("one_thread")


SINUSOID = ["train", "maml", "--data", "sinusoid", "--hidden", 8, "--task-batch", 4, "--eval-tasks", 8, "--threads", 1,
            "--no-report"]  # fmt: skip


def sinusoid(**changed):
    small = {"hidden": (8,), "task_batch": 4, "iterations": 20, "eval_tasks": 8, "eval_every": 10, "save_every": 5}
    return run_config("maml", "sinusoid", **{**small, **changed})


def trained(folder, steps=20, **changed):
    """A run of `steps`, saved every 5."""
    build_trainer(sinusoid(iterations=steps, **changed), folder).run()
    return CheckpointFolder(folder)


def put(folder, *steps, score=None):
    for step in steps:
        folder.save(step, {"model/w": torch.full((3,), float(step))}, {"score": score})


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


# ----- stopped in a validation


def stopped_at(trainer, step):
    validate = trainer.validate

    def stopped(stop):
        if trainer.step == step:
            signal.raise_signal(signal.SIGINT)
        return validate(stop)

    trainer.validate = stopped
    return trainer


def known(folder):
    checkpoint, _ = folder.newest()
    return checkpoint.step, checkpoint.record["score"], [
        {key: value for key, value in one.items() if key != "seconds"} for one in checkpoint.record["history"]
    ]


@posix
@pytest.mark.parametrize("step", [10, 20], ids=["between", "last"])
def test_a_validation_that_was_interrupted_is_made_up_for(tmp_path, step):
    wanted = known(trained(tmp_path / "straight"))
    folder = CheckpointFolder(tmp_path / "stopped")
    assert stopped_at(build_trainer(sinusoid(), folder.folder), step).run() == signal.SIGINT
    assert folder.newest()[0].step == step and len(known(folder)[2]) == step // 10 - 1
    again = build_trainer(sinusoid(), folder.folder, resume=folder.newest()[0])
    assert again.run() is None
    assert known(folder) == wanted and wanted[1] is not None


def test_an_error_in_a_validation_costs_no_step(tmp_path):
    trainer = build_trainer(sinusoid(save_every=0), tmp_path)

    def fail(_):
        raise MemoryError

    trainer.validate = fail
    with pytest.raises(MemoryError):
        trainer.run()
    assert CheckpointFolder(tmp_path).newest()[0].step == 10


# ----- two runs in one folder


@posix
def test_a_second_run_in_the_folder_is_refused(tmp_path, run):
    trained(tmp_path, 5)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with FolderLock(tmp_path).held():
        with pytest.raises(BlockingIOError, match=f"in use by process {os.getpid()} on "):
            build_trainer(sinusoid(), tmp_path).run()
        _, stderr = run("train", "--resume", "--out", tmp_path, code=2)
        assert stderr.startswith("error: ") and f"in use by process {os.getpid()} on " in stderr
        assert stderr.count("\n") == 1
    del files["run.lock"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "run.lock"} == files

    empty = tmp_path / "new"
    with FolderLock(empty).held():
        _, stderr = run(*SINUSOID, "--iterations", 5, "--out", empty, code=2)
    assert f"in use by process {os.getpid()} on " in stderr and [path.name for path in empty.iterdir()] == ["run.lock"]
    # what a dead process has left does not count
    (empty / "run.lock").write_text('{"pid": 1, "host": "here"}')
    run(*SINUSOID, "--iterations", 5, "--out", empty)


@posix
def test_a_lock_is_given_back_and_taken_twice_by_its_holder(tmp_path):
    lock = FolderLock(tmp_path)
    with lock.held():
        with lock.held():
            pass
        with pytest.raises(BlockingIOError), FolderLock(tmp_path).held():
            pass
        lock.name_run("a")
    with FolderLock(tmp_path).held():
        assert lock.run() == "a"
    (tmp_path / "run.lock").write_text("[" * 100_000)
    assert lock.run() is None


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


# ----- what is not finite


class Net(nn.Module):
    """Loss of each task from its first query, whose square root has no slope at 0; a buffer that sees it too."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch):
        x = batch.query_x[:, 0, 0]
        self.seen += x.sum().detach()
        task_loss = self.w.sum() + (self.w.sum() * x).sqrt()
        return MetaOutput(task_loss.mean(), task_loss)


class Tasks:
    """At some steps, and in tasks 2 and 5 of 6, a value that is no good."""

    kind, input_shape, output_size = "regression", (1,), 1

    def __init__(self, value, *steps):
        self.value, self.steps, self.drawn = value, steps, 0

    def sample(self, num_tasks, *, generator=None):
        self.drawn += 1
        x = torch.ones(num_tasks, 1, 1)
        if self.drawn in self.steps:
            x[[2, 5]] = self.value
        return TaskBatch(x, x, x, x)


@pytest.mark.parametrize(
    ("value", "text"),
    [(math.nan, "the query loss is NaN in tasks 2, 5 of 6"), (0.0, "not finite in parameter w.*comes from tasks 2, 5")],
    ids=["loss", "gradient"],
)
def test_step_and_tasks_are_named(value, text):
    trainer = Trainer(Net(), Tasks(value, 3), task_batch=6, iterations=4)
    with pytest.raises(NonFiniteError, match=f"step 3: .*{text}") as error:
        trainer.run()
    assert error.value.tasks == [2, 5]


@pytest.mark.parametrize("value", [math.nan, 0.0], ids=["loss", "gradient"])
def test_steps_that_are_not_finite_are_left_out(tmp_path, value):
    def train(tasks, iterations, **options):
        trainer = Trainer(Net(), tasks, task_batch=6, iterations=iterations, **options)
        trainer.run()
        return trainer

    saved = CheckpointFolder(tmp_path)
    log = LogReporter(tmp_path, device=torch.device("cpu"))
    skipping = {"skip_non_finite": True, "reporters": (log,), "checkpoints": saved}
    trainer, straight = train(Tasks(value, 2, 5), 7, **skipping), train(Tasks(value), 5)
    assert trainer.skipped == 2 and trainer.step == 7
    assert torch.equal(trainer.algorithm.w, straight.algorithm.w)
    assert torch.equal(trainer.algorithm.seen, straight.algorithm.seen)
    state, wanted = (list(one.optimizer.state.values())[0] for one in (trainer, straight))
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines if "the query loss is" in line.get("left_out", "")] == [2, 5]
    assert lines[-1]["skipped"] == 2
    again = Trainer(Net(), Tasks(value), task_batch=6, iterations=7)
    again.restore(saved.newest()[0])
    assert again.skipped == 2


def test_a_run_of_left_out_steps_alone_ends(monkeypatch):
    monkeypatch.setattr("fastmeta.training.loop._MOST_SKIPPED", 3)
    trainer = Trainer(Net(), Tasks(math.nan, 2, 4, 5, 6), task_batch=6, iterations=10, skip_non_finite=True)
    with pytest.raises(NonFiniteError, match="step 6: 3 steps in a row were left out; of the last, the query"):
        trainer.run()


def test_the_command_leaves_steps_out_and_says_so(tmp_path, run, monkeypatch):
    from fastmeta.tasks import SinusoidTasks

    sample, drawn = SinusoidTasks.sample, []

    def bad_once(self, num_tasks, *, generator=None):
        batch = sample(self, num_tasks, generator=generator)
        drawn.append(num_tasks)
        return TaskBatch(*batch[:3], batch[3] * math.nan) if len(drawn) == 3 else batch

    monkeypatch.setattr(SinusoidTasks, "sample", bad_once)
    options = ["--iterations", 6, "--eval-every", 0, "--out", tmp_path]
    _, stderr = run(*SINUSOID, *options, "--skip-non-finite")
    assert "warning: 1 step was left out" in stderr
    drawn.clear()
    options[-1] = tmp_path / "stops"
    _, stderr = run(*SINUSOID, *options, code=1)
    assert stderr.startswith("error: step 3: the query loss is NaN in tasks 0, 1, 2, 3 of 4")


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    trainer = Trainer(Net(), Tasks(0.0), task_batch=6, iterations=1, checkpoints=CheckpointFolder(tmp_path))
    with torch.no_grad():
        trainer.algorithm.w[1] = math.inf
    with pytest.raises(NonFiniteError, match="the weights are not finite in parameter w"):
        trainer.save()
    assert not list(tmp_path.iterdir())


# ----- signals


class Sends(Reporter):
    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def progress(self, progress):
        for number in self.numbers:
            signal.raise_signal(number)  # handled when this returns
        self.numbers = []


@posix
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_saves_and_leaves(tmp_path, name):
    number = getattr(signal, name)
    before = [signal.getsignal(one) for one in StopSignals.SIGNALS]
    trainer = build_trainer(sinusoid(iterations=10_000), tmp_path, (Sends(number),))
    assert trainer.run() == number and 0 < trainer.step < 10_000
    assert CheckpointFolder(tmp_path).newest()[0].step == trainer.step
    assert [signal.getsignal(one) for one in StopSignals.SIGNALS] == before


@posix
def test_requests_that_follow_each_other_are_one_but_a_second_interrupt_acts(tmp_path):
    trainer = build_trainer(sinusoid(iterations=10_000), tmp_path, (Sends(signal.SIGUSR1, signal.SIGTERM),))
    assert trainer.run() == signal.SIGUSR1
    assert CheckpointFolder(tmp_path).newest()[0].step == trainer.step
    trainer = build_trainer(sinusoid(iterations=10_000), tmp_path, (Sends(signal.SIGTERM, signal.SIGINT),))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where tests run
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
    finally:
        signal.signal(signal.SIGINT, before)


@posix
def test_a_lost_terminal_is_nothing_under_nohup(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert build_trainer(sinusoid(), tmp_path, (Sends(signal.SIGHUP),)).run() is None
    finally:
        signal.signal(signal.SIGHUP, before)


SLOW = """
import sys, time
from fastmeta import cli
from fastmeta.training import Trainer
Trainer.train_step = lambda self: (print("in a step", flush=True), [time.sleep(0.1) for _ in range(600)])
sys.argv = ["fastmeta", *sys.argv[1:]]
cli.main()
"""


@posix
def test_a_second_interrupt_ends_the_command_at_once(tmp_path):
    command = [sys.executable, "-c", SLOW, *map(str, SINUSOID), "--out", str(tmp_path / "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)
    for line in process.stdout:
        if "in a step" in line:
            break
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # the step is to end first
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT and stderr == ""


# ----- disks and clocks


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_names_the_file_and_keeps_what_was_there(tmp_path, run, monkeypatch):
    folder = trained(tmp_path, 5)
    files = sorted(path.name for path in tmp_path.iterdir())
    fsync = os.fsync

    def full_for_tensors(file):
        if any(tmp_path.glob(".step-*.safetensors.*")):
            full()
        fsync(file)

    monkeypatch.setattr("os.fsync", full_for_tensors)
    _, stderr = run("train", "--resume", "--out", tmp_path, "--iterations", 10, "--no-report", code=2)
    assert "No space left on device" in stderr and str(tmp_path / "step-00000010.safetensors") in stderr
    assert stderr.count("\n") == 1
    assert sorted({path.name for path in tmp_path.iterdir()} - {"log.jsonl", "run.toml"}) == files
    assert folder.newest()[0].step == 5


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_log_that_cannot_be_written_is_named():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        append(Path("/dev/full"), "line\n")


def test_a_clock_that_is_set_does_not_change_the_time_of_training(tmp_path, monkeypatch):
    jumps = iter(range(0, 10**9, 10_000))
    monkeypatch.setattr(time, "time", lambda: float(next(jumps)))
    trainer = build_trainer(sinusoid(iterations=None, minutes=0.1 / 60, eval_every=0, save_every=0), tmp_path)
    trainer.run()
    assert 0.1 <= trainer.seconds < 10
    again = build_trainer(sinusoid(iterations=None, minutes=0.2 / 60, eval_every=0, save_every=0), tmp_path)
    again.restore(CheckpointFolder(tmp_path).newest()[0])
    assert again.seconds == trainer.seconds
    again.run()
    assert 0.2 <= again.seconds < 10


@pytest.mark.parametrize("unusable", ["a file", "a full disk"])
def test_a_cache_that_cannot_be_written_is_one_warning(tmp_path, monkeypatch, recwarn, unusable):
    cache = importlib.import_module("fastmeta.tasks.read._cache")
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path / ("file" if unusable == "a file" else "folder")))
    if unusable == "a full disk":
        monkeypatch.setattr(cache, "_write", full)
    warnings.simplefilter("always")
    for name in ("train", "test"):
        tensors, _ = cache.cached(name, "1", lambda: ({"a": torch.ones(2, dtype=torch.uint8)}, {}))
        assert tensors["a"].tolist() == [1, 1]
    told = [str(one.message) for one in recwarn]
    assert len(told) == 1 and str(tmp_path) in told[0] and "next time all is read anew" in told[0]


# ----- fast weights


@pytest.mark.parametrize(("norm", "form"), [(None, "lowrank"), (None, "onchip"), ("layer", "auto"), ("batch", "auto")])
def test_fast_weights_can_be_pickled(norm, form):
    weights, biases = [torch.randn(6, 4), torch.randn(2, 6)], [torch.randn(6), torch.randn(2)]
    x, y = torch.randn(3, 5, 4), torch.randn(3, 5, 2)
    fast = adapt_mlp(x, y, weights, biases, lr=0.1, steps=2, loss="mse", form=form, norm=norm)
    again = pickle.loads(pickle.dumps(fast))
    assert torch.equal(again(x), fast(x)) and len(again) == 3


# ----- killed


@posix
def test_a_run_that_is_killed_and_resumed_loses_nothing():
    script = Path(__file__).with_name("kills.py")
    command = [sys.executable, script, "--runs", "1", "--kills", "5", "--steps", "60"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "1 runs, " in done.stdout, done.stdout + done.stderr
