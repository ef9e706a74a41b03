"""The command line: `fastmeta train`, `evaluate`, `demo` and `info`.

Only names and help stand here. Commands import what they need when they run, so that `--help` is quick.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

app = typer.Typer(
    help="Meta-learning over thousands of tasks at once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
out, err = Console(), Console(stderr=True)


class AlgorithmName(str, Enum):
    maml = "maml"
    protonet = "protonet"


class DataName(str, Enum):
    sinusoid = "sinusoid"
    glyphs = "glyphs"
    omniglot = "omniglot"


class ModelName(str, Enum):
    mlp = "mlp"
    conv4 = "conv4"


class ScheduleName(str, Enum):
    constant = "constant"
    halve = "halve"
    cosine = "cosine"


class MetricName(str, Enum):
    sqeuclidean = "sqeuclidean"
    euclidean = "euclidean"
    cosine = "cosine"
    dot = "dot"
    manhattan = "manhattan"


class Partition(str, Enum):
    vinyals = "vinyals"
    s1200 = "1200"


class SplitName(str, Enum):
    train = "train"
    val = "val"
    test = "test"


_debug = False


def _set_debug(value: bool) -> bool:
    global _debug
    _debug = value
    return value


def _panel(name: str):
    """Options of one group of the help page."""
    return lambda *flags, **more: typer.Option(*flags, **{"rich_help_panel": name, "show_default": False, **more})


_task, _inner, _outer, _run = _panel("Tasks"), _panel("Model and inner loop"), _panel("Outer loop"), _panel("The run")
Int = Optional[int]  # noqa: UP045  typer reads annotations at run time, on Python 3.10 too
Float = Optional[float]  # noqa: UP045
Debug = Annotated[bool, typer.Option("--debug", callback=_set_debug, help="Show the traceback of an error.")]
DataRoot = Annotated[
    Optional[Path],  # noqa: UP045
    _task("--data-root", help="Folder of real data sets; without it, FASTMETA_DATA or a download.", metavar="DIR"),
]
Device = Annotated[str, _run("--device", help="auto, cpu, cuda or cuda:N.", show_default="auto: a GPU if there is one")]
Threads = Annotated[Int, _run("--threads", min=1, help="CPU threads.", show_default="all cores")]


@app.command()
def train(
    algorithm: Annotated[AlgorithmName, typer.Argument(help="What to train.")],
    data: Annotated[
        Optional[DataName],  # noqa: UP045
        _task(
            "--data",
            help="sinusoid is regression; glyphs are drawn on the fly; omniglot is real. Needed, except to resume.",
        ),
    ] = None,
    ways: Annotated[
        Int, _task(min=1, help="N, classes per task; a support set is [T, N * shots, ...].", show_default="5")
    ] = None,
    shots: Annotated[Int, _task(min=1, help="Support examples per class.", show_default="1; sinusoid 10")] = None,
    query_shots: Annotated[
        Int,
        _task(
            min=1,
            help="Query examples per class; a query set is [T, N * query_shots, ...].",
            show_default="15; sinusoid 10",
        ),
    ] = None,
    train_ways: Annotated[
        Int,
        _task(
            min=1,
            help="Classes per training task; protonet learns more from more.",
            show_default="protonet 60, else --ways",
        ),
    ] = None,
    train_shots: Annotated[
        Int, _task(min=1, help="Support examples per class in training.", show_default="--shots")
    ] = None,
    train_query_shots: Annotated[
        Int, _task(min=1, help="Query examples per class in training.", show_default="5; sinusoid --query-shots")
    ] = None,
    partition: Annotated[
        Optional[Partition],  # noqa: UP045
        _task(help="Omniglot's classes: as Vinyals et al., or 1,200 characters to train on.", show_default="vinyals"),
    ] = None,
    data_root: DataRoot = None,
    model: Annotated[
        Optional[ModelName],  # noqa: UP045
        _inner(
            "--model",
            help="mlp on flattened inputs [B, D], or conv4 on images [B, C, H, W].",
            show_default="images conv4",
        ),
    ] = None,
    hidden: Annotated[
        Optional[str],  # noqa: UP045
        _inner(
            "--hidden",
            metavar="N[,N...]",
            help="Hidden widths of the mlp, or channels of conv4.",
            show_default="sinusoid 40,40; conv4 64",
        ),
    ] = None,
    metric: Annotated[
        Optional[MetricName],  # noqa: UP045
        _inner("--metric", help="Distance of protonet, [T, Q, D] to [T, N, D].", show_default="sqeuclidean"),
    ] = None,
    inner_lr: Annotated[
        Float, _inner(help="Step size of adaptation.", show_default="sinusoid 0.01; images 0.4, above 5 ways 0.1")
    ] = None,
    inner_steps: Annotated[
        Int, _inner(min=0, help="K, gradient steps on the support set in training.", show_default="1; above 5 ways 5")
    ] = None,
    eval_inner_steps: Annotated[
        Int, _inner(min=0, help="The same in validation.", show_default="sinusoid --inner-steps; images at least 3")
    ] = None,
    first_order: Annotated[
        Optional[bool],  # noqa: UP045
        _inner(
            "--first-order/--second-order",
            help="Drop second derivatives (first-order MAML).",
            show_default="second order",
        ),
    ] = None,
    engine: Annotated[
        Optional[str],  # noqa: UP045
        _inner(
            "--engine",
            help="What runs the inner loops; [b]auto[/b] picks the fastest that serves.",
            show_default="auto",
        ),
    ] = None,
    task_chunk: Annotated[
        Int, _inner(min=1, help="Tasks at a time, to bound memory; same gradient.", show_default="all")
    ] = None,
    outer_lr: Annotated[Float, _outer(help="Adam's step size.", show_default="0.001")] = None,
    lr_schedule: Annotated[
        Optional[ScheduleName],  # noqa: UP045
        _outer(
            "--lr-schedule", help="cosine falls to 0 at --iterations.", show_default="protonet halve, else constant"
        ),
    ] = None,
    lr_halve_every: Annotated[
        Int, _outer(min=1, help="Halve the outer rate every so many steps.", show_default="protonet 2000")
    ] = None,
    task_batch: Annotated[
        Int,
        _outer(
            min=1, help="T, tasks per step.", show_default="maml: sinusoid 100, images 32, above 5 ways 16; protonet 1"
        ),
    ] = None,
    iterations: Annotated[
        Int, _outer(min=1, help="Steps until the end.", show_default="20000, maml on images 60000; none with --minutes")
    ] = None,
    minutes: Annotated[
        Float, _outer(help="Minutes of training until the end; with --iterations, whichever comes first.")
    ] = None,
    seed: Annotated[Int, _run(help="Of the weights and of the tasks.", show_default="0")] = None,
    device: Annotated[
        Optional[str], _run("--device", help="auto, cpu, cuda or cuda:N.", show_default="auto: a GPU if there is one")
    ] = None,  # noqa: UP045
    threads: Threads = None,
    out_dir: Annotated[
        Optional[Path],  # noqa: UP045
        _run(
            "--out", metavar="DIR", help="The run's folder, for checkpoints.", show_default="runs/ALGORITHM-DATA-TIME"
        ),
    ] = None,
    resume: Annotated[
        bool,
        _run(
            "--resume",
            help="Go on with the run in --out, bit for bit on one device. Its settings hold, options may be left out.",
        ),
    ] = False,
    fall_back: Annotated[
        bool, _run("--fall-back", help="With --resume: if the newest checkpoint is damaged, take the newest whole one.")
    ] = False,
    eval_every: Annotated[
        Int, _run(min=0, help="Validate every so many steps, 0 for never.", show_default="500; sinusoid 1000")
    ] = None,
    eval_tasks: Annotated[Int, _run(min=2, help="Tasks of a validation.", show_default="600")] = None,
    save_every: Annotated[
        Int,
        _run(
            min=0,
            help="Checkpoint every so many steps, beside those at a new best and at the end.",
            show_default="--eval-every",
        ),
    ] = None,
    tensorboard: Annotated[
        bool, _run("--tensorboard/--no-tensorboard", help="Also write TensorBoard scalars to --out.", show_default="no")
    ] = False,
    debug: Debug = False,
) -> None:
    """Meta-train, with checkpoints and validation.

    Defaults are the papers'. SIGINT (Ctrl-C) and SIGTERM write a checkpoint and leave.
    """
    given = dict(
        ways=ways, shots=shots, query_shots=query_shots, train_ways=train_ways, train_shots=train_shots,
        train_query_shots=train_query_shots, partition=_value(partition), data_root=str(data_root) if data_root else None,
        model=_value(model), hidden=_widths(hidden), metric=_value(metric), inner_lr=inner_lr, inner_steps=inner_steps,
        eval_inner_steps=eval_inner_steps, first_order=first_order, engine=engine, task_chunk=task_chunk, outer_lr=outer_lr,
        lr_schedule=_value(lr_schedule), lr_halve_every=lr_halve_every, task_batch=task_batch, iterations=iterations,
        minutes=minutes, seed=seed, device=device, threads=threads, eval_every=eval_every, eval_tasks=eval_tasks,
        save_every=save_every,
    )  # fmt: skip
    from .training import CheckpointFolder, run_config
    from .training.reporting import ConsoleReporter, TensorBoardReporter
    from .training.run import build_trainer, resumed_config

    if resume and out_dir is None:
        raise ValueError("--resume needs --out: the folder of the run to go on with")
    if data is None and not resume:
        raise ValueError(f"--data is needed: one of {', '.join(name.value for name in DataName)}")
    folder = out_dir or Path("runs") / f"{algorithm.value}-{data.value}-{time.strftime('%Y%m%d-%H%M%S')}"
    checkpoint = None
    if resume:
        checkpoint, complaints = _newest(CheckpointFolder(folder), fall_back)
        for complaint in complaints:
            err.print(f"[yellow]warning:[/yellow] passed over {complaint}", highlight=False, soft_wrap=True)
        config = resumed_config(checkpoint, {"algorithm": algorithm.value, "data": _value(data), **given})
    else:
        if CheckpointFolder(folder).steps():
            raise ValueError(
                f"--out {folder} holds a run already: add --resume to go on with it, or name another folder"
            )
        config = run_config(algorithm.value, data.value, **given)

    console = ConsoleReporter(
        out, iterations=config.iterations, minutes=config.minutes, regression=config.data == "sinusoid"
    )
    reporters = (console, TensorBoardReporter(folder)) if tensorboard else (console,)
    trainer = build_trainer(config, folder, reporters)
    if checkpoint is not None:
        trainer.restore(checkpoint)
        _say(f"resumed {folder} at step {trainer.step:,}")
    parameters = sum(p.numel() for p in trainer.algorithm.parameters())
    _say(
        f"{config.algorithm} on {config.data}: {parameters:,} parameters on {trainer.device}, {config.task_batch} tasks a step"
    )
    with console:
        received = trainer.run()
    if received is not None:
        err.print(
            f"stopped by {_signal_name(received)} at step {trainer.step:,}, checkpoint in {folder}; go on with --out {folder} --resume",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        raise typer.Exit(128 + received)
    _say(f"finished at step {trainer.step:,} after {trainer.seconds:.1f} s of training; checkpoints in {folder}")


@app.command()
def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(help="A run's folder (its best checkpoint is taken) or one checkpoint's file.")
    ],
    episodes: Annotated[
        int, typer.Option(min=2, help="Held-out tasks; the interval is 1.96 s / sqrt(episodes).")
    ] = 600,
    split: Annotated[SplitName, typer.Option(help="Whose classes or functions.")] = SplitName.test,
    ways: Annotated[
        Int, typer.Option(min=1, help="Classes per task.", show_default="as trained; maml cannot change it")
    ] = None,
    shots: Annotated[Int, typer.Option(min=1, help="Support examples per class.", show_default="as trained")] = None,
    query_shots: Annotated[
        Int, typer.Option(min=1, help="Query examples per class.", show_default="as trained")
    ] = None,
    inner_steps: Annotated[
        Int,
        typer.Option(
            min=0, help="Steps of adaptation.", show_default="as in validation; 10 for regression, each shown"
        ),
    ] = None,
    newest: Annotated[
        bool, typer.Option("--newest", help="Of a folder, the newest checkpoint instead of the best.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the tasks.")] = 0,
    data_root: DataRoot = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    debug: Debug = False,
) -> None:
    """Held-out accuracy, or mean squared error after each step, with 95% confidence intervals."""
    from .training.evaluate import evaluate as judge
    from .training.reporting import describe
    from .training.run import find_checkpoint, load_for_evaluation

    found = find_checkpoint(checkpoint, newest=newest)
    config, algorithm, tasks = load_for_evaluation(
        found, split.value, device=device, threads=threads, data_root=data_root,
        ways=ways, shots=shots, query_shots=query_shots,
    )  # fmt: skip
    regression = tasks.kind == "regression"
    if inner_steps is None and hasattr(algorithm, "inner_steps"):
        inner_steps = max(10, config.inner_steps) if regression else config.eval_inner_steps
    began = time.perf_counter()
    evaluation = judge(algorithm, tasks, episodes=episodes, inner_steps=inner_steps, by_step=regression, seed=seed)
    seconds = time.perf_counter() - began
    if as_json:
        record = {
            "checkpoint": str(found.path), "step": found.step, "algorithm": config.algorithm, "data": config.data,
            "split": split.value, "ways": ways or config.ways, "shots": shots or config.shots,
            "query_shots": query_shots or config.query_shots, "inner_steps": inner_steps, "seed": seed, "seconds": seconds,
            **evaluation.as_json(),
        }  # fmt: skip
        print(json.dumps(record, indent=1, allow_nan=False))
        return
    size = f"{shots or config.shots} shots" if regression else f"{ways or config.ways}-way {shots or config.shots}-shot"
    _say(
        f"{config.algorithm} on {config.data}, {split.value}, {size}, {episodes} episodes, step {found.step:,} ({found.path})"
    )
    _say(f"[bold]{describe(evaluation, regression)}[/bold]  (95% confidence interval, {seconds:.1f} s)")
    for step, estimate in enumerate(evaluation.loss_by_step):
        _say(f"  MSE after {step:>2} inner step{' ' if step == 1 else 's'}  {estimate.plain()}")


@app.command()
def demo(
    out_dir: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the picture goes.")] = Path("demo"),
    data_root: DataRoot = None,
    quick: Annotated[bool, typer.Option("--quick", hidden=True, help="A few seconds, to see that it runs.")] = False,
    debug: Debug = False,
) -> None:
    """Under three minutes on two CPU cores: MAML on sinusoids, a prototypical network on characters, and a
    picture."""
    from .demo import run_demo

    run_demo(out_dir, data_root=data_root, quick=quick, console=out)


@app.command()
def info() -> None:
    """Versions, devices, and which backend serves each op, with the reasons."""
    from .info import print_info

    print_info()


def main() -> None:
    """The entry point. A mistake of the user's ends in one line on stderr and exit code 2, training that
    diverged in 1."""
    with _clear_errors():
        app(prog_name="fastmeta")


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        _fail(error, 2)
    except RuntimeError as error:
        # Only what has a message made for people: any other RuntimeError is a bug, and its traceback is
        # wanted.
        from .training import NonFiniteError

        if isinstance(error, NonFiniteError):
            _fail(error, 1)
        if type(error).__name__ == "OutOfMemoryError":
            _fail(RuntimeError(f"out of memory: --task-chunk bounds it ({str(error).splitlines()[0]})"), 1)
        raise


def _fail(error: Exception, code: int) -> None:
    if _debug:
        raise error
    message = " ".join(str(error).split()) or type(error).__name__
    err.print("[bold red]error:[/bold red] ", end="")
    err.print(message, markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


def _say(text: str) -> None:
    out.print(text, highlight=False, soft_wrap=True)


def _value(choice: Enum | None) -> str | None:
    return None if choice is None else choice.value


def _widths(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--hidden must be numbers with commas between, such as 64,64; got {text!r}") from None


def _signal_name(number: int) -> str:
    import signal

    return signal.Signals(number).name


def _newest(folder, fall_back: bool):
    from .training import CheckpointError

    try:
        return folder.newest(fall_back=fall_back)
    except CheckpointError as error:
        if fall_back or len(folder.steps()) < 2:
            raise
        raise CheckpointError(f"{error}. Add --fall-back to go on from an older checkpoint") from error
