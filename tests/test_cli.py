"""The command line, as a user runs it. Each process costs seconds, so each test looks at much."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

SINUSOID = ["train", "maml", "--data", "sinusoid", "--task-batch", "4", "--eval-tasks", "8", "--threads", "1"]


def start(*arguments, **keywords):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}
    environment.pop("FASTMETA_DATA", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return subprocess.Popen([sys.executable, "-m", "fastmeta", *map(str, arguments)], **pipes, **keywords)


def run(*arguments, code=0):
    process = start(*arguments)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == code, stdout + stderr
    assert "Traceback" not in stderr
    return stdout, stderr


def test_train_evaluate_and_resume(tmp_path):
    folder = tmp_path / "run"
    stdout, _ = run(*SINUSOID, "--iterations", 20, "--eval-every", 10, "--out", folder)
    assert re.search(r"step +20 .*validation MSE [\d.]+ ± ", stdout) and "finished at step 20" in stdout
    assert sorted(path.name for path in folder.iterdir())[-2:] == ["step-00000020.json", "step-00000020.safetensors"]

    stdout, stderr = run("evaluate", folder, "--episodes", 30, "--inner-steps", 2, "--threads", 1, "--json")
    record = json.loads(stdout)
    assert record["algorithm"] == "maml" and record["split"] == "test" and record["inner_steps"] == 2
    assert record["loss"].keys() == {"mean", "ci95", "episodes"} and record["loss"]["episodes"] == 30
    assert len(record["loss_by_step"]) == 3 and record["loss_by_step"][2] == record["loss"]

    stdout, _ = run("train", "maml", "--out", folder, "--resume", "--iterations", 30)
    assert "resumed" in stdout and "finished at step 30" in stdout


@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"])
def test_a_signal_checkpoints_and_leaves(tmp_path, number, code):
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
    if number == signal.SIGTERM:
        stdout, _ = run("train", "maml", "--out", folder, "--resume", "--iterations", step + 3, "--eval-every", 0)
        assert f"resumed {folder} at step {step:,}" in stdout and f"finished at step {step + 3:,}" in stdout


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path):
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
        (["train", "protonet", "--data", "sinusoid"], "sinusoid is regression"),
        (["train", "maml", "--data", "cifar"], "cifar"),
        (["train", "maml", "--data", "sinusoid", "--device", "abacus"], "device 'abacus' cannot be used"),
        (["evaluate", "nowhere"], "nowhere: no such file or folder"),
        (["train", "maml", "--resume", "--out", "nowhere"], "nowhere: no checkpoint to load"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(tmp_path, monkeypatch, capsys, arguments, text):
    from fastmeta import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fastmeta", *arguments])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    stderr = capsys.readouterr().err
    assert leaving.value.code == 2 and text in stderr and "Traceback" not in stderr
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(tmp_path):
    process = start("train", "protonet", "--data", "sinusoid", "--debug")
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 1 and "Traceback" in stderr


def test_training_that_diverges_says_where(tmp_path):
    arguments = [*SINUSOID, "--inner-lr", "1e30", "--inner-steps", 3, "--iterations", 5, "--out", tmp_path / "run"]
    _, stderr = run(*arguments, code=1)
    assert re.match(r"error: step 1: the query loss is NaN in tasks? ", stderr)


def test_demo_and_info(tmp_path):
    stdout, _ = run("demo", "--quick", "--out", tmp_path)
    for text in ("MSE before adaptation", "5-way 1-shot", "tasks/s", "torch.func"):
        assert text in stdout
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    stdout, _ = run("info")
    assert "torch" in stdout
