"""The command line: whole commands, and in a process of their own only what needs one, since each costs seconds."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from fastmeta import cli

SINUSOID = ["train", "maml", "--data", "sinusoid", "--task-batch", "4", "--eval-tasks", "8", "--threads", "1"]


def start(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    environment.pop("FASTMETA_DATA", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return subprocess.Popen([sys.executable, "-m", "fastmeta", *map(str, arguments)], **pipes)


def test_train_evaluate_and_resume(tmp_path, run):
    folder = tmp_path / "run"
    stdout, _ = run(*SINUSOID, "--iterations", 20, "--eval-every", 10, "--out", folder, "--test-tasks", 30)
    assert re.search(r"step +20 .*validation MSE [\d.]+ ± ", stdout) and "finished at step 20" in stdout
    assert re.search(r"test split, 10 shots, 30 episodes.*\n.*95% confidence interval", stdout)
    assert sorted(path.name for path in folder.iterdir())[-2:] == ["step-00000020.json", "step-00000020.safetensors"]

    stdout, _ = run("evaluate", folder, "--episodes", 30, "--inner-steps", 2, "--threads", 1, "--json")
    record = json.loads(stdout)
    assert record["algorithm"] == "maml" and record["split"] == "test" and record["inner_steps"] == 2
    assert record["loss"].keys() == {"mean", "ci95", "episodes"} and record["loss"]["episodes"] == 30
    assert len(record["loss_by_step"]) == 3 and record["loss_by_step"][2] == record["loss"]
    stdout, _ = run("evaluate", folder / "step-00000020.json", "--episodes", 30, "--threads", 1)
    assert "30 episodes" in stdout and len(re.findall(r"MSE after +\d+ inner steps", stdout)) == 11
    _, stderr = run("evaluate", folder, "--ways", 3, code=2)
    assert "ways must be 1, got 3" in stderr

    _, stderr = run(*SINUSOID, "--out", folder, code=2)
    assert "holds a run already" in stderr
    _, stderr = run("train", "maml", "--out", folder, "--resume", "--inner-lr", 0.5, code=2)
    assert "--resume cannot change inner_lr 0.01 to 0.5" in stderr
    stdout, _ = run("train", "maml", "--out", folder, "--resume", "--iterations", 30)
    assert "resumed" in stdout and "finished at step 30" in stdout


@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"])
def test_a_signal_checkpoints_and_leaves(tmp_path, run, number, code):
    folder = tmp_path / "run"
    process = start(*SINUSOID, "--iterations", 1_000_000, "--eval-every", 5, "--out", folder)
    until = time.monotonic() + 200
    while not list(folder.glob("*.json")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == code, stdout + stderr
    step = int(re.search(rf"stopped by {number.name} at step ([\d,]+)", stderr)[1].replace(",", ""))
    assert (folder / f"step-{step:08d}.json").exists()
    stdout, _ = run("train", "maml", "--out", folder, "--resume", "--iterations", step + 3, "--eval-every", 0)
    assert f"resumed {folder} at step {step:,}" in stdout and f"finished at step {step + 3:,}" in stdout


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, run):
    folder = tmp_path / "run"
    run(*SINUSOID, "--iterations", 4, "--eval-every", 0, "--save-every", 2, "--out", folder)
    newest = folder / "step-00000004.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    resume = ["train", "maml", "--out", folder, "--resume", "--iterations", 5]
    _, stderr = run(*resume, code=2)
    assert stderr.startswith("error: ") and str(newest) in stderr and "--fall-back" in stderr
    stdout, stderr = run(*resume, "--fall-back")
    assert "warning: passed over" in stderr and str(newest) in stderr and "at step 2" in stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["train", "maml"], "--data is needed"),
        (["train", "protonet", "--data", "sinusoid"], "sinusoid is regression"),
        (["train", "maml", "--data", "cifar"], "cifar"),
        (["train", "maml", "--data", "sinusoid", "--hidden", "4x4"], "numbers with commas"),
        (["train", "maml", "--data", "sinusoid", "--device", "abacus"], "cuda:<number>', got 'abacus'"),
        (["train", "maml", "--data", "sinusoid", "--device", "meta"], "must be the CPU or a CUDA device, got meta"),
        (["train", "maml", "--data", "sinusoid", "--minutes", "inf"], "minutes must be finite, got inf"),
        (["train", "maml", "--data", "sinusoid", "--seed", 10**20], "seed must lie in [-2^63, 2^63)"),
        (["train", "maml", "--data", "sinusoid", "--task-batch", 10**20], "task_batch must be at most 2147483647"),
        (["train", "maml", "--data", "sinusoid", "--hidden", f"4,{10**20}"], "hidden must be at most 2147483647"),
        (["train", "maml", "--data", "sinusoid", "--threads", 10**6], "threads must be at most 1024, got 1000000"),
        (["irl", "gridworld", "--device", "banana"], "cuda:<number>', got 'banana'"),
        (["irl", "gridworld", "--seed", 10**20], "seed must lie in [-2^63, 2^63)"),
        (["train", "protonet", "--data", "omniglot", "--data-root", "nowhere"], "'nowhere' is not a folder"),
        (["evaluate", "nowhere"], "nowhere: no such file or folder"),
        (["train", "maml", "--resume", "--out", "nowhere"], "nowhere: no checkpoint to load"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(tmp_path, monkeypatch, run, arguments, text):
    monkeypatch.chdir(tmp_path)
    _, stderr = run(*arguments, code=2)
    assert text in stderr and "Traceback" not in stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [[*SINUSOID, "--save-every", 0, "--minutes", 60], ["demo"]], ids=["train", "demo"])
def test_a_folder_that_cannot_be_written_is_noticed_before_training(tmp_path, run, command):
    (tmp_path / "file").touch()
    _, stderr = run(*command, "--out", tmp_path / "file", code=2)
    assert stderr == f"error: {tmp_path / 'file'} cannot be written: File exists\n"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:128] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("Storage size calculation overflowed with sizes=[4611686018427387904, 4]"),
        MemoryError(),
        OverflowError("Python int too large to convert to C long"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_too_large_for_the_memory_ends_in_one_line(monkeypatch, run, error):
    def fail(**_):
        raise error

    monkeypatch.setattr("fastmeta.training.run_config", fail)
    _, stderr = run(*SINUSOID, code=1)
    assert stderr.startswith("error: too large for this machine: ") and stderr.count("\n") == 1


def test_debug_raises(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fastmeta", "train", "protonet", "--data", "sinusoid", "--debug"])
    with pytest.raises(ValueError, match="sinusoid is regression"):
        cli.main()


def test_training_that_diverges_says_where(tmp_path, run):
    diverging = ["--inner-lr", "1e30", "--inner-steps", 3, "--iterations", 5, "--out", tmp_path / "run"]
    _, stderr = run(*SINUSOID, *diverging, code=1)
    assert re.match(r"error: step 1: the query loss is (NaN|inf) in tasks? ", stderr)


def test_tensorboard_scalars(tmp_path, run):
    pytest.importorskip("tensorboard")
    run(*SINUSOID, "--iterations", 2, "--eval-every", 1, "--out", tmp_path, "--tensorboard")
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_demo(tmp_path):
    process = start("demo", "--quick", "--out", tmp_path)
    stdout, stderr = process.communicate(timeout=500)
    assert process.returncode == 0, stdout + stderr
    for text in ("MSE before adaptation", "5-way 1-shot", "tasks/s", "torch.func"):
        assert text in stdout
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_info(run):
    stdout, _ = run("info")
    assert torch.__version__ in stdout
