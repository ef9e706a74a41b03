"""What a run must not lose: by its own saving, by signals, full disks, other runs in its folder. That a killed run
loses nothing is tried by `kills.py` at random moments."""

import errno
import importlib
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from small_runs import SINUSOID, posix, sinusoid, trained

from fastmeta.functional import adapt_mlp
from fastmeta.training import (
    CheckpointFolder,
    Reporter,
)
from fastmeta.training.checkpoint import append
from fastmeta.training.lock import FolderLock
from fastmeta.training.run import build_trainer
from fastmeta.training.signals import StopSignals

pytestmark = pytest.mark.usefixtures("one_thread")


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
    outside = signal.signal(number, signal.SIG_DFL)  # it may be ignored where tests run, as nohup has it
    try:
        before = [signal.getsignal(one) for one in StopSignals.SIGNALS]
        trainer = build_trainer(sinusoid(iterations=10_000), tmp_path, (Sends(number),))
        assert trainer.run() == number and 0 < trainer.step < 10_000
        assert CheckpointFolder(tmp_path).newest()[0].step == trainer.step
        assert [signal.getsignal(one) for one in StopSignals.SIGNALS] == before
    finally:
        signal.signal(number, outside)


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
