"""What the commands do with a run: begin it in its folder, train, judge, report; and read what they are given of it."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

import typer

from . import options
from .config_file import write_settings
from .messages import err, out, say, warn

if TYPE_CHECKING:
    from ..tasks import Data
    from ..training import Checkpoint, CheckpointFolder, Evaluation, RunConfig, Trainer

Made = TypeVar("Made")


def train_in(
    trainer: Trainer,
    config: RunConfig,
    folder: Path,
    opened: Data | None,
    *,
    test_tasks: int | None,
    tensorboard: bool,
    report: bool,
) -> None:
    """Train into a folder that is locked, and say so."""
    from ..training.checkpoint import check_writable
    from ..training.distributed import leave
    from ..training.log import LogReporter
    from ..training.reporting import ConsoleReporter, TensorBoardReporter
    from ..training.run import find_checkpoint

    ranks = trainer.ranks
    bar = ConsoleReporter(out, iterations=config.iterations, minutes=config.minutes, regression=config.regression)
    if ranks.first:
        check_writable(folder)
        log = LogReporter(folder, step=trainer.step, seconds=trainer.seconds, device=trainer.device)
        write_settings(folder / "run.toml", config, test_tasks=test_tasks, tensorboard=tensorboard, report=report)
        trainer.reporters = (bar, log, *([TensorBoardReporter(folder)] if tensorboard else []))
    parameters = sum(p.numel() for p in trainer.algorithm.parameters())
    say(
        f"{config.algorithm} on {config.data}: {parameters:,} parameters on {trainer.device}, "
        f"{config.task_batch} {'task' if config.task_batch == 1 else 'tasks'} a step"
        f"{'' if ranks.alone else f', on {ranks.world} processes'}"
    )
    with _interrupt_ends_at_once(), bar:
        received = trainer.run()
    if trainer.skipped:
        were = "step was" if trainer.skipped == 1 else "steps were"
        warn(f"warning: {trainer.skipped:,} {were} left out, whose loss or gradient is not finite")
    if received is not None:
        leave()
        warn(
            f"stopped by {signal.Signals(received).name} at step {trainer.step:,}, checkpoint in {folder}; "
            f"go on with: fastmeta train {config.algorithm} --out {folder} --resume"
        )
        raise typer.Exit(128 + received)
    say(f"finished at step {trainer.step:,} after {trainer.seconds:.1f} s of training; checkpoints in {folder}")
    if test_tasks is not None:
        ranks.told(None)  # rank 0 has saved
        best = find_checkpoint(folder)
        judged = judge(best, episodes=test_tasks, device=config.device, threads=config.threads, opened=opened)
        if ranks.first:
            log.test(best.step, judged)
    leave()  # others have ended, or go on to what is next
    if report and ranks.first:
        report_at_end(folder, config, opened)


@contextlib.contextmanager
def _interrupt_ends_at_once() -> Iterator[None]:
    """Inside, SIGINT is the system's, which ends the process wherever it is: what acts when a run has already been
    asked to leave. Under torchrun it does nothing then: torchrun sends what a terminal has sent already, and ends what
    does not leave."""
    from ..training.distributed import launched

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if launched() else signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


def judge(
    found: Checkpoint,
    *,
    episodes: int,
    split: str = "test",
    sizes: Mapping[str, int | None] = MappingProxyType({}),
    inner_steps: int | None = None,
    seed: int = 0,
    data_root: Path | None = None,
    data: str | None = None,
    device: str,
    threads: int | None,
    as_json: bool = False,
    opened: Data | None = None,
) -> Evaluation:
    """Say how good a checkpoint is on held-out tasks, and return it."""
    from ..training.evaluate import evaluate as judged_on
    from ..training.reporting import describe
    from ..training.run import load_for_evaluation

    config, algorithm, tasks = load_for_evaluation(
        found, split, device=device, threads=threads, data_root=data_root, data=data, progress=err.is_terminal,
        opened=opened, **sizes,
    )  # fmt: skip
    sizes = {name: sizes.get(name) or getattr(config, name) for name in ("ways", "shots", "query_shots")}
    regression = tasks.kind == "regression"
    if inner_steps is None and hasattr(algorithm, "inner_steps"):
        inner_steps = max(10, config.inner_steps) if regression else config.eval_inner_steps
    began = time.perf_counter()
    evaluation = judged_on(algorithm, tasks, episodes=episodes, inner_steps=inner_steps, by_step=regression, seed=seed)
    seconds = time.perf_counter() - began
    if as_json:
        about = {"checkpoint": str(found.path), "step": found.step, "algorithm": config.algorithm, "data": config.data}
        about |= {"split": split, **sizes, "inner_steps": inner_steps, "seed": seed, "seconds": seconds}
        if not out.quiet:
            print(json.dumps({**about, **evaluation.as_json()}, indent=1, allow_nan=False))
        return evaluation
    size = f"{sizes['shots']} shots" if regression else f"{sizes['ways']}-way {sizes['shots']}-shot"
    say(f"{config.algorithm} on {config.data}, {split} split, {size}, {episodes} episodes, {found.path}")
    say(f"{describe(evaluation, regression)} (95% confidence interval), in {seconds:.1f} s", style="bold")
    targets = (getattr(tasks.inputs, "table", None) or {}).get("targets") if hasattr(tasks, "inputs") else None
    if targets is not None and targets["shift"] and len(targets["scale"]) == 1:
        error = targets["scale"][0] * evaluation.loss.mean**0.5
        say(f"  targets have variance 1 in training; in their own unit the root of the MSE is {error:.4g}")
    if evaluation.calibration_error is not None:
        say(f"  expected calibration error {100 * evaluation.calibration_error:.2f}%")
    for step, estimate in enumerate(evaluation.loss_by_step):
        say(f"  MSE after {step:>2} inner steps  {estimate.plain()}")
    return evaluation


def report_at_end(folder: Path, config: RunConfig, opened: Data | None) -> None:
    """The report at the end of a run, which stays a good one if there is something wrong with that."""
    from ..training.report import write_report

    try:
        tasks = min(config.eval_tasks, 100)
        path = write_report(
            folder, tasks=tasks, device=config.device, threads=config.threads, data_root=config.data_root, opened=opened
        )
        say(f"report in {path}")
    except Exception as error:
        if options.debugging():
            raise
        warn(f"warning: no report was written: {' '.join(str(error).split())}")


def newest_that_fits(folder: CheckpointFolder, fall_back: bool, use: Callable[[Checkpoint], Made]) -> Made:
    """What `use` makes of the newest checkpoint that it can."""
    from ..training import CheckpointError

    try:
        made, complaints = folder.newest(fall_back=fall_back, use=use)
    except CheckpointError as error:
        if fall_back or len(folder.steps()) < 2:
            raise
        raise CheckpointError(f"{error}. --fall-back goes on from the newest checkpoint that fits") from error
    for complaint in complaints:
        warn(f"warning: passed over {complaint}")
    return made


def refuse_second_run(folder: Path) -> None:
    """Raise a ValueError where `--out` is the folder of a run."""
    from ..training import CheckpointFolder

    if CheckpointFolder(folder).steps():
        raise ValueError(f"--out {folder} holds a run already: --resume goes on with it, or name another folder")


def refuse_overwriting(path: Path | None, force: bool) -> None:
    """Raise a ValueError where a file is there that nobody said to write over."""
    if path is not None and path.exists() and not force:
        raise ValueError(f"{path} is there already: --force writes over it, or name another file")


def open_own(data: str) -> Data | None:
    """Own data, opened with a bar; None for a name."""
    from ..tasks.read import is_form, open_data

    return open_data(data, progress=err.is_terminal and not err.quiet) if is_form(data) else None


def own_data(data: str, **chosen: int | bool | str | None) -> str:
    """`--data` with what is chosen beside it as options of its own, so that a run keeps all in one line."""
    there = [name for name, value in chosen.items() if value is not None]
    if not there:
        return data
    from ..tasks.read import is_form, with_options

    if not is_form(data):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in there)
        raise ValueError(f"{flags}: of --data folder:PATH and zip:PATH, and it is {data}")
    return with_options(data, **chosen)


def settings_of(given: list[str] | None, flag: str, example: str) -> tuple[tuple[str, object], ...] | None:
    """`NAME=VALUE` with a JSON value; what is no JSON is a word."""
    found = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"{flag} must be NAME=VALUE, such as {example}; got {text!r}")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return tuple(sorted(found.items())) or None


def widths_of(text: str | None) -> tuple[int, ...] | None:
    """`--hidden`."""
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--hidden must be numbers with commas between, such as 64,64; got {text!r}") from None
