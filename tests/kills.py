"""Runs that are killed at random moments (`kill -9`) and resumed, until they end: they must end with the bits of a run
that nobody disturbed, and with the same files.

`python tests/kills.py --runs 30 --kills 5`; the suite does it once, see test_nothing_lost.py. A run is a process of its
own that does what `fastmeta train` does; it is forked, so that it begins at once.

With `--ranks 2` a run is an elastic agent, as torchrun is one, and processes of its own, of which one at random is
killed; the agent starts them anew, nobody resumes.
"""

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from ranks import agent, children, command

from fastmeta import cli
from fastmeta.cli import config_file, options  # noqa: F401
from fastmeta.training import CheckpointFolder, reporting, run_config  # noqa: F401
from fastmeta.training.log import read_log
from fastmeta.training.run import build_trainer

NEW = ["train", "maml", "--data", "sinusoid", "--hidden", "8", "--task-batch", "4", "--eval-tasks", "8",
       "--threads", "1", "--eval-every", "15", "--save-every", "4"]  # fmt: skip


def start(folder: Path, steps: int, ranks: int) -> int:
    """Begin or go on, in a new process; its id."""
    pid = os.fork()
    if pid:
        return pid
    if ranks > 1:
        words = [*NEW, "--no-report", "--out", folder, "--iterations", steps]
        os.dup2(os.open(folder.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        try:
            agent(ranks, command, folder.with_suffix(".txt"), *words, restarts=100)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.dup2(os.open(folder.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    goes_on = CheckpointFolder(folder).steps()
    sys.argv = ["fastmeta", *(["train", "--resume"] if goes_on else NEW), "--no-report", "--out", str(folder)]
    sys.argv += ["--iterations", str(steps)]
    try:
        cli.main()
    except SystemExit as leaving:
        sys.stdout.flush()
        os._exit(leaving.code or 0)
    os._exit(99)


def ended(pid: int, folder: Path) -> None:
    _, status = os.waitpid(pid, 0)
    if status:
        raise SystemExit(f"ended with {status}: {folder.with_suffix('.txt').read_text()}")


def kill(pid: int, ranks: int) -> bool:
    """Kill the run, or one of the processes that its agent has started; whether there was one."""
    if ranks == 1:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return True
    if started := children(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(random.choice(started), signal.SIGKILL)
            return True
    return False


def result(folder: Path) -> tuple:
    """What must not depend on kills: tensors, validations, names of files."""
    checkpoint, _ = CheckpointFolder(folder).newest()
    history = [{key: value for key, value in one.items() if key != "seconds"} for one in checkpoint.record["history"]]
    tensors = {name: (str(t.dtype), t.numpy().tobytes()) for name, t in checkpoint.tensors.items()}
    logged = [(line["step"], line["validation"]) for line in read_log(folder) if "validation" in line]
    files = sorted(path.name for path in folder.iterdir())
    return checkpoint.step, tensors, history, logged, files


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=int, default=30)
    arguments.add_argument("--kills", type=int, default=5, help="of each run")
    arguments.add_argument("--steps", type=int, default=300, help="of each run")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--ranks", type=int, default=1, help="processes that train together")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    random.seed(given.seed)
    with tempfile.TemporaryDirectory() as parent:
        # what is imported and compiled once is here before the first fork
        build_trainer(run_config("maml", "sinusoid", iterations=1, task_batch=4, eval_tasks=8), f"{parent}/first").run()
        undisturbed, began = Path(parent) / "undisturbed", time.monotonic()
        ended(start(undisturbed, given.steps, given.ranks), undisturbed)
        print(f"undisturbed: {time.monotonic() - began:.2f} s")
        seconds, wanted = time.monotonic() - began, result(undisturbed)
        assert wanted[0] == given.steps
        kills, at = 0, []
        for number in range(given.runs):
            folder = Path(parent) / str(number)
            pid = None
            for _ in range(given.kills):
                pid = pid or start(folder, given.steps, given.ranks)
                time.sleep(random.uniform(0, 1.5 * seconds / given.kills))
                if os.waitpid(pid, os.WNOHANG)[0]:
                    pid = None
                    break
                if kill(pid, given.ranks):
                    kills += 1
                    at += CheckpointFolder(folder).steps()[-1:] or [0]
                if given.ranks == 1:
                    pid = None
            ended(pid or start(folder, given.steps, given.ranks), folder)
            names = ("step", "tensors", "history", "log", "files")
            for what, found, expected in zip(names, result(folder), wanted, strict=True):
                if found != expected:
                    raise SystemExit(f"run {number}: another {what} than undisturbed: {found}, not {expected}"[:2000])
    print(f"{given.runs} runs, {kills} kills at {len(set(at))} different steps: all ended with the same bits")


if __name__ == "__main__":
    main()
