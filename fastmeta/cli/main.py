"""The command line: `fastmeta train` and all the others.

Commands import what they need when they run, so that `--help` is quick. The options stand in `options.py`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

import typer
from rich.console import Console

from . import options
from .config_file import write_settings

if TYPE_CHECKING:
    from ..tasks import Data
    from ..training import Checkpoint, CheckpointFolder, Evaluation, RunConfig, Trainer

app = typer.Typer(
    help="Meta-learning over thousands of tasks at once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out, err = Console(), Console(stderr=True)
Made = TypeVar("Made")


@app.command()
def train(
    algorithm: options.Algorithm = None,
    config_file: options.Config = None,
    data: options.Data = None,
    ways: options.Ways = None,
    shots: options.Shots = None,
    query_shots: options.QueryShots = None,
    train_ways: options.TrainWays = None,
    train_shots: options.TrainShots = None,
    train_query_shots: options.TrainQueryShots = None,
    partition: options.Partition = None,
    image_size: options.ImageSize = None,
    grey: options.Grey = None,
    on_error: options.OnError = None,
    rotations: options.Rotations = None,
    labels: options.Labels = None,
    augment: options.Augment = None,
    augment_support: options.AugmentSupport = None,
    cluster_checkpoint: options.ClusterCheckpoint = None,
    clusters: options.Clusters = None,
    cluster_partitions: options.ClusterPartitions = None,
    data_root: options.DataRoot = None,
    model: options.Model = None,
    hidden: options.Hidden = None,
    norm: options.Norm = None,
    encoder: options.Encoder = None,
    freeze_encoder: options.FreezeEncoder = None,
    metric: options.Metric = None,
    inner_lr: options.InnerLR = None,
    inner_steps: options.InnerSteps = None,
    eval_inner_steps: options.EvalInnerSteps = None,
    first_order: options.FirstOrder = None,
    engine: options.Engine = None,
    settings: options.Settings = None,
    task_chunk: options.TaskChunk = None,
    outer_lr: options.OuterLR = None,
    lr_schedule: options.Schedule = None,
    lr_halve_every: options.HalveEvery = None,
    task_batch: options.TaskBatchSize = None,
    iterations: options.Iterations = None,
    minutes: options.Minutes = None,
    seed: options.Seed = None,
    device: options.Device = None,
    threads: options.Threads = None,
    out_dir: options.RunFolder = None,
    resume: options.Resume = False,
    fall_back: options.FallBack = False,
    eval_every: options.EvalEvery = None,
    eval_tasks: options.EvalTasks = None,
    save_every: options.SaveEvery = None,
    test_tasks: options.TestTasks = None,
    skip_non_finite: options.SkipNonFinite = None,
    tensorboard: options.TensorBoard = False,
    report: options.Report = True,
    debug: options.Debug = False,
) -> None:
    """Meta-train, with checkpoints and validation.

    Defaults are the papers' settings. SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR1 write a checkpoint and leave; a
    second Ctrl-C leaves at once.
    """
    if data is not None:
        data = _own_data(data, image_size=image_size, grey=grey, on_error=on_error.value if on_error else None)
    given = dict(
        algorithm=algorithm, data=data, ways=ways, shots=shots, query_shots=query_shots, train_ways=train_ways,
        train_shots=train_shots, train_query_shots=train_query_shots, partition=partition, rotations=rotations,
        data_root=str(data_root) if data_root else None, model=model, hidden=_widths(hidden), norm=norm, metric=metric,
        encoder=str(encoder) if encoder else None, freeze_encoder=freeze_encoder, inner_lr=inner_lr,
        inner_steps=inner_steps, eval_inner_steps=eval_inner_steps, first_order=first_order,
        engine=engine, task_chunk=task_chunk, outer_lr=outer_lr, lr_schedule=lr_schedule,
        lr_halve_every=lr_halve_every, task_batch=task_batch, iterations=iterations, minutes=minutes, seed=seed,
        device=device, threads=threads, eval_every=eval_every, eval_tasks=eval_tasks, save_every=save_every,
        skip_non_finite=skip_non_finite,
        labels=labels, augmentation=_settings(augment, "--augment", "rotate=15"), augment_support=augment_support,
        cluster_checkpoint=str(cluster_checkpoint) if cluster_checkpoint else None, clusters=clusters,
        cluster_partitions=cluster_partitions, settings=_settings(settings, "--set", "full_context=true"),
    )  # fmt: skip
    given = {name: value.value if isinstance(value, Enum) else value for name, value in given.items()}
    from ..training import CheckpointFolder, run_config
    from ..training.checkpoint import check_writable
    from ..training.run import build_trainer, resumed_config

    with contextlib.ExitStack() as leaving:
        if resume:
            if out_dir is None:
                raise ValueError("--resume needs --out: the folder of the run to go on with")
            folder = out_dir
            checkpoints = CheckpointFolder(folder)
            if checkpoints.steps():  # else there is nothing to lock
                leaving.enter_context(checkpoints.lock.held())

            def resumed(checkpoint: Checkpoint) -> tuple[RunConfig, Data | None, Trainer]:
                config = resumed_config(checkpoint, given)
                opened = _open(config.data)
                return config, opened, build_trainer(config, folder, resume=checkpoint, opened=opened)

            config, opened, trainer = _newest(checkpoints, fall_back, resumed)
            _say(f"resumed {folder} at step {trainer.step:,}")
            trainer.checkpoints = checkpoints
        else:
            if algorithm is None:
                raise ValueError(f"what to train is needed: one of {', '.join(options.ALGORITHM_NAMES)}")
            if data is None:
                names = ", ".join(options.DATA_NAMES)
                raise ValueError(f"--data is needed: one of {names}, or your own, such as folder:PATH")
            opened = _open(data)
            config = run_config(**given, opened=opened)
            name = f"{config.algorithm}-{config.data_name}-{time.strftime('%Y%m%d-%H%M%S')}"
            folder = out_dir or Path("runs") / name
            _refuse_second_run(folder)
            trainer = build_trainer(config, folder, opened=opened)
            check_writable(folder)
            leaving.enter_context(trainer.checkpoints.lock.held())
            _refuse_second_run(folder)  # one that was here, and has ended meanwhile
        _train(trainer, config, folder, opened, test_tasks=test_tasks, tensorboard=tensorboard, report=report)


def _refuse_second_run(folder: Path) -> None:
    from ..training import CheckpointFolder

    if CheckpointFolder(folder).steps():
        raise ValueError(f"--out {folder} holds a run already: --resume goes on with it, or name another folder")


def _train(
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
    from ..training.log import LogReporter
    from ..training.reporting import ConsoleReporter, TensorBoardReporter
    from ..training.run import find_checkpoint

    check_writable(folder)
    bar = ConsoleReporter(out, iterations=config.iterations, minutes=config.minutes, regression=config.regression)
    log = LogReporter(folder, step=trainer.step, seconds=trainer.seconds, device=trainer.device)
    write_settings(folder / "run.toml", config, test_tasks=test_tasks, tensorboard=tensorboard, report=report)
    trainer.reporters = (bar, log, *([TensorBoardReporter(folder)] if tensorboard else []))
    parameters = sum(p.numel() for p in trainer.algorithm.parameters())
    _say(
        f"{config.algorithm} on {config.data}: {parameters:,} parameters on {trainer.device}, "
        f"{config.task_batch} {'task' if config.task_batch == 1 else 'tasks'} a step"
    )
    with _interrupt_ends_at_once(), bar:
        received = trainer.run()
    if trainer.skipped:
        were = "step was" if trainer.skipped == 1 else "steps were"
        _warn(f"warning: {trainer.skipped:,} {were} left out, whose loss or gradient is not finite")
    if received is not None:
        _warn(
            f"stopped by {signal.Signals(received).name} at step {trainer.step:,}, checkpoint in {folder}; "
            f"go on with: fastmeta train {config.algorithm} --out {folder} --resume"
        )
        raise typer.Exit(128 + received)
    _say(f"finished at step {trainer.step:,} after {trainer.seconds:.1f} s of training; checkpoints in {folder}")
    if test_tasks is not None:
        best = find_checkpoint(folder)
        judged = _judge(best, episodes=test_tasks, device=config.device, threads=config.threads, opened=opened)
        log.test(best.step, judged)
    if report:
        _report(folder, config, opened)


@contextlib.contextmanager
def _interrupt_ends_at_once() -> Iterator[None]:
    """Inside, SIGINT is the system's, which ends the process wherever it is: what acts when a run has already been
    asked to leave."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


@app.command()
def evaluate(
    checkpoint: options.Checkpoint,
    episodes: options.Episodes = 600,
    split: options.Split = options.SplitName.test,
    ways: options.TestWays = None,
    shots: options.TestShots = None,
    query_shots: options.TestQueryShots = None,
    inner_steps: options.TestInnerSteps = None,
    newest: options.Newest = False,
    seed: options.TestSeed = 0,
    data_root: options.DataRoot = None,
    device: options.Device = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Held-out accuracy, or mean squared error after each inner step, with 95% confidence intervals."""
    from ..training.run import find_checkpoint

    _judge(
        find_checkpoint(checkpoint, newest=newest), episodes=episodes, split=split.value, inner_steps=inner_steps,
        seed=seed, data_root=data_root, device=device or "auto", threads=threads, as_json=as_json,
        sizes={"ways": ways, "shots": shots, "query_shots": query_shots},
    )  # fmt: skip


@app.command()
def report(
    run: options.ReportRun,
    tasks: options.ReportTasks = 100,
    data_root: options.DataRoot = None,
    device: options.Device = None,
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Write report.html into a run's folder: curves, queries with predictions and mistakes, settings."""
    from ..training.report import write_report

    path = write_report(run, tasks=tasks, device=device or "auto", threads=threads, data_root=data_root)
    _say(f"report in {path}")


def _report(folder: Path, config: RunConfig, opened: Data | None) -> None:
    """The report at the end of a run, which stays a good one if there is something wrong with that."""
    from ..training.report import write_report

    try:
        tasks = min(config.eval_tasks, 100)
        path = write_report(
            folder, tasks=tasks, device=config.device, threads=config.threads, data_root=config.data_root, opened=opened
        )
        _say(f"report in {path}")
    except Exception as error:
        if options.debugging():
            raise
        _warn(f"warning: no report was written: {' '.join(str(error).split())}")


def _judge(
    found: Checkpoint,
    *,
    episodes: int,
    split: str = "test",
    sizes: Mapping[str, int | None] = MappingProxyType({}),
    inner_steps: int | None = None,
    seed: int = 0,
    data_root: Path | None = None,
    device: str,
    threads: int | None,
    as_json: bool = False,
    opened: Data | None = None,
) -> Evaluation:
    """Say how good a checkpoint is on held-out tasks, and return it."""
    from ..training.evaluate import evaluate as judge
    from ..training.reporting import describe
    from ..training.run import config_of, load_for_evaluation

    opened = opened or _open(config_of(found).data)
    config, algorithm, tasks = load_for_evaluation(
        found, split, device=device, threads=threads, data_root=data_root, opened=opened, **sizes
    )
    sizes = {name: sizes.get(name) or getattr(config, name) for name in ("ways", "shots", "query_shots")}
    regression = tasks.kind == "regression"
    if inner_steps is None and hasattr(algorithm, "inner_steps"):
        inner_steps = max(10, config.inner_steps) if regression else config.eval_inner_steps
    began = time.perf_counter()
    evaluation = judge(algorithm, tasks, episodes=episodes, inner_steps=inner_steps, by_step=regression, seed=seed)
    seconds = time.perf_counter() - began
    if as_json:
        about = {"checkpoint": str(found.path), "step": found.step, "algorithm": config.algorithm, "data": config.data}
        about |= {"split": split, **sizes, "inner_steps": inner_steps, "seed": seed, "seconds": seconds}
        print(json.dumps({**about, **evaluation.as_json()}, indent=1, allow_nan=False))
        return evaluation
    size = f"{sizes['shots']} shots" if regression else f"{sizes['ways']}-way {sizes['shots']}-shot"
    _say(f"{config.algorithm} on {config.data}, {split} split, {size}, {episodes} episodes, {found.path}")
    _say(f"{describe(evaluation, regression)} (95% confidence interval), in {seconds:.1f} s", style="bold")
    targets = (getattr(tasks.inputs, "table", None) or {}).get("targets") if hasattr(tasks, "inputs") else None
    if targets is not None and targets["shift"] and len(targets["scale"]) == 1:
        error = targets["scale"][0] * evaluation.loss.mean**0.5
        _say(f"  targets have variance 1 in training; in their own unit the root of the MSE is {error:.4g}")
    if evaluation.calibration_error is not None:
        _say(f"  expected calibration error {100 * evaluation.calibration_error:.2f}%")
    for step, estimate in enumerate(evaluation.loss_by_step):
        _say(f"  MSE after {step:>2} inner steps  {estimate.plain()}")
    return evaluation


@app.command()
def predict(
    run: options.Run,
    support: options.Support,
    query: options.Query,
    out_file: options.Predictions = None,
    as_json: options.Json = False,
    calibrate: options.Calibrate = False,
    force: options.Force = False,
    on_error: options.Damaged = options.OnErrorName.refuse,
    image_size: options.RuleImageSize = None,
    grey: options.RuleGrey = None,
    label: options.Label = None,
    target: options.Target = None,
    device: options.Device = None,
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Adapt to examples of your own classes, and say what other pictures or rows are."""
    if out_file is None and not as_json:
        raise ValueError("--out is needed: the CSV file for the predictions; or --json, which prints them")
    _refuse_overwriting(out_file, force)
    import torch

    from .predict import predict as predicted
    from .predict import write

    if threads:
        torch.set_num_threads(threads)
    began = time.perf_counter()
    found, about = predicted(
        run, support, query, calibrate=calibrate, device=device, on_error=on_error.value, image_size=image_size,
        grey=grey, label=label, target=target or (),
    )  # fmt: skip
    if out_file is not None:
        write(out_file, found)
    about |= {"seconds": time.perf_counter() - began}
    if as_json:
        told = {"run": run, "out": str(out_file) if out_file else None, **about, "predictions": found.as_json()}
        print(json.dumps(told, indent=1, allow_nan=False))
        return
    of = f" of {len(about['classes'])} classes" if "classes" in about else ""
    _say(f"{about['query_rows']:,} predictions from {about['support_rows']:,} support rows{of}: {out_file}")
    if "accuracy" in about:
        _say(f"{100 * about['accuracy']:.1f}% are as the folders or labels of the queries say", style="bold")
    if calibrate:
        none = " (nothing to fit it to: one class, or one with one row)" if about["temperature"] == 1 else ""
        _say(f"temperature {about['temperature']:.3g}{none}")


@app.command()
def embed(
    source: options.EncoderSource,
    data: options.EmbedData,
    out_file: options.FeaturesFile = Path("features.safetensors"),
    force: options.Force = False,
    data_root: options.DataRoot = None,
    device: options.Device = None,
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Write an encoder's features of a data set once; algorithms then train on them."""
    splits = out_file.with_suffix(".csv")
    for path in (out_file, splits):
        _refuse_overwriting(path, force)
    import torch

    from ..training.features import embed_data

    if threads:
        torch.set_num_threads(threads)
    examples = embed_data(source, data, out_file, splits, device=device or "auto", data_root=data_root)
    _say(f"{examples}: {out_file}, its splits: {splits}")
    form = f"safetensors:{out_file}?splits={splits.name}"
    _say(f"train on them with: fastmeta train ridge --data '{form}' --model none")


def _refuse_overwriting(path: Path | None, force: bool) -> None:
    if path is not None and path.exists() and not force:
        raise ValueError(f"{path} is there already: --force writes over it, or name another file")


@app.command()
def reproduce(
    suite: options.Suite = "quick",
    out_dir: options.ReproduceFolder = Path("runs/reproduce"),
    only: options.Only = None,
    episodes: options.Episodes = 600,
    data_root: options.DataRoot = None,
    device: options.Device = None,
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Train and judge every algorithm, and write one table. Stopped, it goes on when typed again."""
    from .reproduce import reproduce as run

    run(
        suite, out_dir, only=only, episodes=episodes, threads=threads, device=device or "auto",
        data_root=str(data_root) if data_root else None, console=out,
    )  # fmt: skip
    _say(f"table in {out_dir / suite / 'table.md'}", style="bold")


@app.command()
def irl(
    world: options.World,
    iterations: options.IrlIterations = 600,
    tasks: options.IrlTasks = 200,
    seed: options.IrlSeed = 0,
    device: options.Device = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Learn rewards from 1, 5 and 10 demonstrations: meta-learned, averaged over tasks, and from scratch."""
    import torch
    from rich.progress import Progress
    from rich.table import Table

    from ..irl.experiment import experiment

    if threads:
        torch.set_num_threads(threads)
    chosen = device if device not in (None, "auto") else "cuda" if torch.cuda.is_available() else "cpu"
    with Progress(console=err, transient=True) as bar:
        bars = {name: bar.add_task(name, total=iterations) for name in ("meta", "averaged")}
        rows = experiment(
            world.value, iterations=iterations, num_tasks=tasks, seed=seed, device=chosen,
            progress=lambda method, step: bar.update(bars[method], completed=step),
        )  # fmt: skip
    if as_json:
        print(json.dumps(rows, indent=1, allow_nan=False))
        return
    title = f"{world.value}: 0 is the best policy, 1 chance"
    table = Table("method", "demonstrations", "value difference", title=title)
    for row in rows:
        found = row["value_difference"]
        table.add_row(row["method"], str(row["demonstrations"]), f"{found['mean']:.3f} ± {found['ci95']:.3f}")
    out.print(table)


@app.command()
def demo(
    out_dir: options.DemoFolder = Path("demo"),
    data_root: options.DataRoot = None,
    quick: options.Quick = False,
    debug: options.Debug = False,
) -> None:
    """MAML on sinusoids, a prototypical network on characters, and a picture: under three minutes on two CPU cores."""
    from .demo import run_demo

    run_demo(out_dir, data_root=data_root, quick=quick, console=out)


@app.command()
def info() -> None:
    """Versions, devices, and which backend serves each op, with the reasons."""
    from .info import print_info

    print_info()


def main() -> None:
    """The entry point. A user's mistake ends in one line on stderr and code 2, training that diverged in code 1."""
    with _clear_errors():
        app(prog_name="fastmeta")


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        otherwise = warnings.showwarning

        def show(message, category, *where, **more):
            if category.__name__ == "DataWarning":  # of fastmeta.tasks, which takes too long to import for --help
                _warn(f"warning: {message}")
            else:
                otherwise(message, category, *where, **more)

        warnings.showwarning = show
        with _one_line():
            yield


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        _fail(error, 2)
    except (MemoryError, OverflowError) as error:
        _fail(RuntimeError(f"too large for this machine: {str(error) or 'out of memory'}"), 1)
    except RuntimeError as error:
        # Any other RuntimeError is a bug, whose traceback is wanted.
        from torch import OutOfMemoryError

        from ..training import NonFiniteError

        if isinstance(error, OutOfMemoryError):
            _fail(RuntimeError(f"{str(error).splitlines()[0]} --task-chunk bounds the memory of a step"), 1)
        of_memory = ("can't allocate memory", "bad_alloc", "overflow")
        if any(text in str(error).lower() for text in of_memory):  # of a CPU, which has no class
            said = str(error).splitlines()[0]
            _fail(RuntimeError(f"too large for this machine: {said}; --task-chunk bounds the memory of a step"), 1)
        if isinstance(error, NonFiniteError):
            _fail(error, 1)
        raise


def _fail(error: Exception, code: int) -> None:
    if options.debugging():
        raise error
    err.print("[bold red]error:[/bold red] ", end="")
    err.print(" ".join(str(error).split()) or type(error).__name__, markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


def _say(text: str, style: str | None = None) -> None:
    _print(out, text, style)


def _warn(text: str) -> None:
    _print(err, text, "yellow")


def _print(console: Console, text: str, style: str | None) -> None:
    try:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)  # a path may look like markup
    except OSError as error:
        if error.errno != errno.EIO:  # a terminal that was closed, on which a run goes on
            raise


def _own_data(data: str, **chosen: int | bool | str | None) -> str:
    """`--data` with what is chosen beside it as options of its own, so that a run keeps all in one line."""
    there = [name for name, value in chosen.items() if value is not None]
    if not there:
        return data
    from ..tasks.read import is_form, with_options

    if not is_form(data):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in there)
        raise ValueError(f"{flags}: of --data folder:PATH and zip:PATH, and it is {data}")
    return with_options(data, **chosen)


def _open(data: str) -> Data | None:
    """Own data, opened with a bar; None for a name."""
    from ..tasks.read import is_form, open_data

    return open_data(data, progress=err.is_terminal) if is_form(data) else None


def _settings(given: list[str] | None, flag: str, example: str) -> tuple[tuple[str, object], ...] | None:
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


def _widths(text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--hidden must be numbers with commas between, such as 64,64; got {text!r}") from None


def _newest(folder: CheckpointFolder, fall_back: bool, use: Callable[[Checkpoint], Made]) -> Made:
    """What `use` makes of the newest checkpoint that it can."""
    from ..training import CheckpointError

    try:
        made, complaints = folder.newest(fall_back=fall_back, use=use)
    except CheckpointError as error:
        if fall_back or len(folder.steps()) < 2:
            raise
        raise CheckpointError(f"{error}. --fall-back goes on from the newest checkpoint that fits") from error
    for complaint in complaints:
        _warn(f"warning: passed over {complaint}")
    return made
