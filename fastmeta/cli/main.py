"""The command line: `fastmeta train` and all the others.

Commands import what they need when they run, so that `--help` is quick. The options stand in `options.py`, what the
commands share of a run in `runs.py`, and how they speak in `messages.py`.
"""

from __future__ import annotations

import contextlib
import json
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from . import options
from .messages import clear_errors, err, one_speaks, out, say
from .runs import (
    judge,
    newest_that_fits,
    open_own,
    own_data,
    refuse_overwriting,
    refuse_second_run,
    settings_of,
    train_in,
    widths_of,
)

if TYPE_CHECKING:
    from ..tasks import Data
    from ..training import Checkpoint, RunConfig, Trainer

app = typer.Typer(
    help="Meta-learning over thousands of tasks at once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
    autocast: options.Autocast = None,
    compile: options.Compile = None,
    capture: options.Capture = None,
    prefetch: options.Prefetch = None,
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
    second Ctrl-C leaves at once. Many processes: torchrun --nproc-per-node 4 -m fastmeta train ...
    """
    if data is not None:
        data = own_data(data, image_size=image_size, grey=grey, on_error=on_error.value if on_error else None)
    else:  # of a run that goes on, which has its own
        alone = {"--image-size": image_size, "--grey": grey, "--on-error": on_error}
        for name in (name for name, value in alone.items() if value is not None):
            raise ValueError(f"{name} says how --data is read, and there is no --data")
    given = dict(
        algorithm=algorithm, data=data, ways=ways, shots=shots, query_shots=query_shots, train_ways=train_ways,
        train_shots=train_shots, train_query_shots=train_query_shots, partition=partition, rotations=rotations,
        data_root=str(data_root) if data_root else None, model=model, hidden=widths_of(hidden), norm=norm,
        metric=metric, encoder=str(encoder) if encoder else None, freeze_encoder=freeze_encoder, inner_lr=inner_lr,
        inner_steps=inner_steps, eval_inner_steps=eval_inner_steps, first_order=first_order,
        engine=engine, task_chunk=task_chunk, autocast=autocast, compile=compile, capture=capture,
        prefetch=prefetch,
        outer_lr=outer_lr, lr_schedule=lr_schedule,
        lr_halve_every=lr_halve_every, task_batch=task_batch, iterations=iterations, minutes=minutes, seed=seed,
        device=device, threads=threads, eval_every=eval_every, eval_tasks=eval_tasks, save_every=save_every,
        skip_non_finite=skip_non_finite,
        labels=labels, augmentation=settings_of(augment, "--augment", "rotate=15"), augment_support=augment_support,
        cluster_checkpoint=str(cluster_checkpoint) if cluster_checkpoint else None, clusters=clusters,
        cluster_partitions=cluster_partitions, settings=settings_of(settings, "--set", "full_context=true"),
    )  # fmt: skip
    given = {name: value.value if isinstance(value, Enum) else value for name, value in given.items()}
    from ..training import CheckpointFolder, run_config
    from ..training.checkpoint import check_writable
    from ..training.distributed import joined, restarts
    from ..training.own_data import reopened
    from ..training.run import build_trainer, resumed_config

    with contextlib.ExitStack() as leaving:
        ranks = leaving.enter_context(joined(device))
        one_speaks(ranks)
        restarted, may_restart = restarts()
        if may_restart and out_dir is None:
            raise ValueError("--max-restarts needs --out: the folder where processes that start anew find the run")
        # rank 0 alone writes, and its lock is that of all
        resume = resume or ranks.told(bool(restarted and CheckpointFolder(out_dir).steps()))
        if resume:
            if out_dir is None:
                raise ValueError("--resume needs --out: the folder of the run to go on with")
            folder = out_dir
            checkpoints = CheckpointFolder(folder)
            if ranks.first and checkpoints.steps():  # else there is nothing to lock
                leaving.enter_context(checkpoints.lock.held())
            ranks.told(None)  # now nobody else writes there

            def resumed(checkpoint: Checkpoint) -> tuple[RunConfig, Data | None, Trainer]:
                config = resumed_config(checkpoint, given)
                opened = reopened(checkpoint, config, same=True, progress=err.is_terminal)
                return config, opened, build_trainer(config, folder, resume=checkpoint, opened=opened)

            config, opened, trainer = newest_that_fits(checkpoints, fall_back, resumed)
            say(f"resumed {folder} at step {trainer.step:,}")
            trainer.checkpoints = checkpoints
        else:
            if algorithm is None:
                raise ValueError(f"what to train is needed: one of {', '.join(options.ALGORITHM_NAMES)}")
            if data is None:
                names = ", ".join(options.DATA_NAMES)
                raise ValueError(f"--data is needed: one of {names}, or your own, such as folder:PATH")
            opened = open_own(data)
            config = run_config(**given, opened=opened)
            name = f"{config.algorithm}-{config.data_name}-{time.strftime('%Y%m%d-%H%M%S')}"
            folder = ranks.told(out_dir or Path("runs") / name)
            refuse_second_run(folder)
            trainer = build_trainer(config, folder, opened=opened)
            if ranks.first:
                check_writable(folder)
                leaving.enter_context(trainer.checkpoints.lock.held())
                refuse_second_run(folder)  # one that was here, and has ended meanwhile
        train_in(trainer, config, folder, opened, test_tasks=test_tasks, tensorboard=tensorboard, report=report)


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
    data: options.RunData = None,
    data_root: options.DataRoot = None,
    device: options.Device = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Held-out accuracy, or mean squared error after each inner step, with 95% confidence intervals."""
    from ..training.distributed import joined
    from ..training.run import find_checkpoint

    with joined(device) as ranks:
        one_speaks(ranks)
        judge(
            find_checkpoint(checkpoint, newest=newest), episodes=episodes, split=split.value, inner_steps=inner_steps,
            seed=seed, data_root=data_root, data=data, device=device or "auto", threads=threads, as_json=as_json,
            sizes={"ways": ways, "shots": shots, "query_shots": query_shots},
        )  # fmt: skip


@app.command()
def report(
    run: options.ReportRun,
    tasks: options.ReportTasks = 100,
    data: options.RunData = None,
    data_root: options.DataRoot = None,
    device: options.Device = None,
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Write report.html into a run's folder: curves, queries with predictions and mistakes, settings."""
    from ..training.report import write_report

    path = write_report(
        run, tasks=tasks, device=device or "auto", threads=threads, data_root=data_root, data=data
    )
    say(f"report in {path}")


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
    refuse_overwriting(out_file, force)
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
    say(f"{about['query_rows']:,} predictions from {about['support_rows']:,} support rows{of}: {out_file}")
    if "accuracy" in about:
        say(f"{100 * about['accuracy']:.1f}% are as the folders or labels of the queries say", style="bold")
    if calibrate:
        none = " (nothing to fit it to: one class, or one with one row)" if about["temperature"] == 1 else ""
        say(f"temperature {about['temperature']:.3g}{none}")


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
        refuse_overwriting(path, force)
    from urllib.parse import quote

    import torch

    from ..tasks.read import quoted
    from ..training.features import embed_data

    if threads:
        torch.set_num_threads(threads)
    examples = embed_data(source, data, out_file, splits, device=device or "auto", data_root=data_root)
    say(f"{examples}: {out_file}, its splits: {splits}")
    form = f"safetensors:{quoted(out_file)}?splits={quote(splits.name)}"
    say(f"train on them with: fastmeta train ridge --data '{form}' --model none")


@app.command()
def reproduce(
    suite: options.Suite = "quick",
    out_dir: options.ReproduceFolder = Path("runs/reproduce"),
    only: options.Only = None,
    episodes: options.SuiteEpisodes = None,
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
    say(f"table in {out_dir / suite / 'table.md'}", style="bold")


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
def bench(
    group: options.BenchGroup = None,
    against: options.Against = None,
    device: options.Device = None,
    dtype: options.BenchDtype = "float32",
    threads: options.Threads = None,
    seconds: options.BenchSeconds = None,
    quick: options.BenchQuick = False,
    out_dir: options.BenchFolder = None,
    compare: options.Before = None,
    debug: options.Debug = False,
) -> None:
    """Time fastmeta beside its peers, on the same work in the same run: under 40 minutes on two CPU cores.

    Ctrl-C ends it, and what is done is kept.
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    from .bench import bench as timed
    from .bench import plan_of

    plan = plan_of(group, against, device, dtype, seconds, threads, quick)
    raise typer.Exit(timed(plan, folder=out_dir, before=compare, out=out, err=err))


@app.command()
def tune(
    reset: options.Reset = False,
    seconds: options.TuneSeconds = 1.0,
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Measure on this machine's CPU where automatic choices should change, and keep it: about a minute."""
    import torch

    from . import tune as command

    if threads:
        torch.set_num_threads(threads)
    if reset:
        command.reset(out)
    else:
        command.tune(seconds=seconds, out=out, err=err)


@app.command()
def info() -> None:
    """Versions, devices, and which backend serves each op, with the reasons."""
    from .info import print_info

    print_info()


def main() -> None:
    """The entry point. A user's mistake ends in one line on stderr and code 2, training that diverged in code 1."""
    with clear_errors():
        app(prog_name="fastmeta")
