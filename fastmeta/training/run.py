"""From a `RunConfig` to a trainer, and from a checkpoint or a run's folder back to a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .. import values
from ..tasks import (
    AugmentedTasks,
    ClusterTasks,
    Data,
    Inputs,
    Prefetched,
    TaskSource,
    embed_images,
    kmeans_partitions,
    load_images,
    make_tasks,
    open_data,
)
from ..tasks.read import is_form, parse
from ..tasks.read.tasks import with_inputs
from .checkpoint import Checkpoint, CheckpointError, CheckpointFolder, load_checkpoint
from .config import RunConfig
from .distributed import own_gpu
from .encoder import freeze_encoder, load_encoder
from .evaluate import Evaluation, evaluate
from .loop import Reporter, Trainer
from .own_data import relocated, reopened
from .registry import ALGORITHMS
from .restore import load_model

# What may differ when a run goes on: none of it changes what a step computes, beyond rounding, if the step is finite.
MAY_CHANGE = (
    "iterations",
    "minutes",
    "device",
    "data_root",
    "threads",
    "engine",
    "task_chunk",
    "compile",
    "capture",
    "prefetch",
    "eval_every",
    "eval_tasks",
    "save_every",
    "skip_non_finite",
)
_VALIDATION_SEED = 1_000_003  # not a seed that a user is likely to train with


def prepare(config: RunConfig) -> torch.device:
    """Set what is global in PyTorch (threads, deterministic convolutions) and return the device. Raises
    ValueError."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    return device_of(config.device)


def device_of(name: str) -> torch.device:
    """The device of this name; of "auto" a GPU if there is one. Raises ValueError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return values.device("device", own_gpu() if name == "cuda" else name)


def open_source(config: RunConfig, opened: Data | None = None) -> str | Data:
    """What the config's tasks are made from: a name, or own data, `opened` if that is done."""
    return (opened or open_data(config.data)) if is_form(config.data) else config.data


def build_tasks(
    config: RunConfig, split: str, device: torch.device, *, opened: Data | None = None, **changed: int | None
) -> TaskSource:
    """The config's tasks of one split (`"train"`, `"val"` or `"test"`), with true labels; `changed` replaces ways,
    shots or query_shots; `opened` is the config's own data, if it has been opened."""
    prefix = "train_" if split == "train" else ""
    sizes = {name: getattr(config, prefix + name) for name in ("ways", "shots", "query_shots")}
    sizes |= {name: value for name, value in changed.items() if value is not None}
    if config.regression:
        del sizes["ways"]
    return make_tasks(
        open_source(config, opened), split, **sizes, device=device, data_root=config.data_root,
        partition=config.partition, rotations=config.rotations and not config.regression,
    )  # fmt: skip


def build_training_tasks(config: RunConfig, device: torch.device, opened: Data | None = None) -> TaskSource:
    """What the config trains on: tasks of the split "train", with true labels or, from its images alone, made ones.

    Raises ValueError; ImportError where clusters need scikit-learn and there is none.
    """
    if config.labels == "true":
        return build_tasks(config, "train", device, opened=opened)
    source = open_source(config, opened)
    images = load_images(source, "train", data_root=config.data_root, partition=config.partition).to(device)
    options: dict[str, Any] = {name: getattr(config, f"train_{name}") for name in ("ways", "shots", "query_shots")}
    options |= {"rotations": config.rotations, "name": f"{config.data_name}/train"}
    if config.labels == "augment":
        how = {"augmentation": config.augment(), "augment_support": config.augment_support}
        return _from(source, AugmentedTasks(images, **how, **options))
    embeddings = images.flatten(0, -4)
    if config.cluster_checkpoint is not None:
        embeddings = F.normalize(embed_images(_encoder(config, device), images), dim=1)
    partitions = kmeans_partitions(embeddings, config.clusters, config.cluster_partitions, seed=config.seed)
    return _from(source, ClusterTasks(images, partitions, **options))


def _from(source: str | Data, tasks: TaskSource) -> TaskSource:
    return with_inputs(tasks, source) if isinstance(source, Data) else tasks


def _encoder(config: RunConfig, device: torch.device) -> nn.Module:
    learner = load(config.cluster_checkpoint, device=str(device))
    encoder = getattr(learner, "encoder", None)
    if encoder is None:
        found = learner.config.algorithm
        raise ValueError(f"cluster_checkpoint must be of an algorithm with an encoder, got one of {found}")
    return encoder


def build_algorithm(config: RunConfig, tasks: TaskSource | Inputs, device: torch.device) -> nn.Module:
    """The config's algorithm with newly initialised weights, which depend on `config.seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        algorithm = ALGORITHMS[config.algorithm].build(config, tasks, dict(config.settings))
    if config.freeze_encoder:
        freeze_encoder(algorithm)
    return algorithm.to(device)


def validator(
    config: RunConfig, algorithm: nn.Module, device: torch.device, opened: Data | None = None
) -> Callable[..., Evaluation | None]:
    """What a trainer calls to validate: the same `config.eval_tasks` held-out tasks every time."""
    tasks = build_tasks(config, "val", device, opened=opened)
    steps = config.eval_inner_steps if hasattr(algorithm, "inner_steps") else None
    episodes = config.eval_tasks
    return lambda stop: evaluate(
        algorithm, tasks, episodes=episodes, inner_steps=steps, seed=_VALIDATION_SEED, stop=stop
    )


def build_trainer(
    config: RunConfig,
    folder: str | Path | None,
    reporters: tuple[Reporter, ...] = (),
    *,
    resume: Checkpoint | None = None,
    opened: Data | None = None,
) -> Trainer:
    """A trainer that saves into `folder` (None: nowhere), at step 0 or where the checkpoint `resume` was written.
    `opened` is own data that has been opened."""
    device = prepare(config)
    if is_form(config.data):
        opened = open_source(config, opened)
    tasks = build_training_tasks(config, device, opened)
    algorithm = build_algorithm(config, tasks, device)
    if config.encoder is not None and resume is None:  # from then on the checkpoints have its weights
        load_encoder(algorithm, config.encoder)
    if config.prefetch and not isinstance(tasks, Prefetched):
        tasks = Prefetched(tasks)
    torch.manual_seed(config.seed)  # for what draws from the global generators while training, such as dropout
    trainer = Trainer(
        algorithm,
        tasks,
        task_batch=config.task_batch,
        outer_lr=config.outer_lr,
        lr_schedule=config.lr_schedule,
        lr_halve_every=config.lr_halve_every,
        iterations=config.iterations,
        minutes=config.minutes,
        validate=validator(config, algorithm, device, opened) if config.eval_every else None,
        eval_every=config.eval_every,
        checkpoints=CheckpointFolder(folder) if folder is not None else None,
        save_every=config.save_every,
        record={"config": config.as_json(), "inputs": Inputs.of(tasks).as_json()}
        | ({} if opened is None else {"classes": opened.digest()}),
        seed=config.seed,
        skip_non_finite=config.skip_non_finite,
        task_chunk=config.task_chunk,
        autocast=config.autocast,
        compile=config.compile,
        capture=config.capture,
        reporters=reporters,
    )
    if resume is not None:
        trainer.restore(resume)
    return trainer


def config_of(checkpoint: Checkpoint) -> RunConfig:
    """The settings that `checkpoint` was trained with. Raises CheckpointError if there are none."""
    try:
        return RunConfig.from_json(checkpoint.record["config"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint.path}: config: no settings that this version can read ({error})") from error


def resumed_config(checkpoint: Checkpoint, given: dict[str, Any]) -> RunConfig:
    """The run's own settings with what is `given` anew. Raises ValueError for a change that would make it
    another run; own data may be elsewhere, and read as they were."""
    config = config_of(checkpoint)
    if given.get("data") is not None and is_form(given["data"]) and is_form(config.data):
        elsewhere = relocated(config, given["data"])
        if parse(elsewhere.data).options == parse(config.data).options:
            config, given = elsewhere, {**given, "data": None}
    if given.get("augmentation") is not None:  # a part of it may be given
        given = {**given, "augmentation": tuple((dict(config.augmentation) | dict(given["augmentation"])).items())}
    changed = {key: value for key, value in given.items() if value is not None and value != getattr(config, key)}
    refused = [f"{key} {getattr(config, key)!r} to {changed[key]!r}" for key in changed if key not in MAY_CHANGE]
    if refused:
        raise ValueError(f"--resume cannot change {', '.join(refused)}; only {', '.join(MAY_CHANGE)} may change")
    return dataclasses.replace(config, **changed)


def find_checkpoint(path: str | Path, *, newest: bool = False) -> Checkpoint:
    """The checkpoint at `path`: a file of one, or a run's folder, whose best one is taken (or its newest)."""
    path = Path(path)
    if path.is_dir():
        folder = CheckpointFolder(path)
        return folder.newest()[0] if newest else folder.best()
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    return load_checkpoint(path)


def check_ways(config: RunConfig, ways: int) -> None:
    """Raise ValueError for a number of classes that the config's algorithm cannot serve."""
    if ALGORITHMS[config.algorithm].fixed_ways and ways != config.ways:
        raise ValueError(
            f"ways must be {config.ways}, got {ways}: this {config.algorithm} was trained with one output per class"
        )


def load_for_evaluation(
    checkpoint: Checkpoint,
    split: str = "test",
    *,
    device: str = "auto",
    threads: int | None = None,
    data_root: str | Path | None = None,
    ways: int | None = None,
    shots: int | None = None,
    query_shots: int | None = None,
    data: str | None = None,
    progress: bool = False,
    opened: Data | None = None,
) -> tuple[RunConfig, nn.Module, TaskSource]:
    """A checkpoint's settings, its trained algorithm, and tasks of `split` to judge it on, by default as it
    was validated. `data` is a line that says where the run's own data are now, if they have moved, or on what else to
    judge it; `progress` draws a bar where they are decoded; `opened` is the run's own data, if it has been opened.

    Raises CheckpointError if the checkpoint does not fit, ValueError for `ways` that the model cannot serve, and for
    data that are not there or that it does not read.
    """
    config = relocated(config_of(checkpoint), data)
    if ways is not None:
        check_ways(config, ways)
    if data_root is not None:
        config = dataclasses.replace(config, data_root=str(data_root))
    config = dataclasses.replace(config, device=device, threads=threads)
    where = prepare(config)
    sizes = {"ways": ways, "shots": shots, "query_shots": query_shots}
    sizes = {name: value or getattr(config, name) for name, value in sizes.items()}
    opened = opened or reopened(checkpoint, config, progress=progress)
    tasks = build_tasks(config, split, where, opened=opened, **sizes)
    algorithm = build_algorithm(config, tasks, where)
    load_model(algorithm, checkpoint)
    return config, algorithm, tasks


def load(path: str | Path, *, newest: bool = False, device: str = "auto") -> nn.Module:
    """The trained learner of a run, from its folder alone: no data set is read.

    Args:
        path: a run's folder, of which the best checkpoint by validation is taken, or one checkpoint's file.
        newest: of a folder, take the newest checkpoint instead.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".

    Returns:
        The learner in eval mode, with `adapt(support_x, support_y)` and `predict(state, query_x)` on whole task batches
        `[T, ...]`. It takes tasks of any number of classes, where each class is not an output of its last layer, and as
        many inner steps as in validation. `learner.config` is the run's `RunConfig`, `learner.inputs` says what rows it
        reads and makes them of yours (`~fastmeta.tasks.Inputs`).

    Raises:
        CheckpointError: no checkpoint there, or a damaged one, or of another version. TypeError: a path that is none.
    """
    checkpoint = find_checkpoint(values.path("path", path), newest=newest)
    config, where = config_of(checkpoint), device_of(device)
    known = checkpoint.record.get("inputs")
    try:
        # runs of before have no inputs; their data is needed for what it looks like
        inputs = Inputs.of(build_tasks(config, "val", where)) if known is None else Inputs.from_json(known)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint.path}: inputs: not what rows look like ({error})") from error
    learner = build_algorithm(config, inputs, where)
    load_model(learner, checkpoint)
    if hasattr(learner, "ways"):
        learner.ways = None
    if hasattr(learner, "inner_steps"):
        learner.inner_steps = config.eval_inner_steps
    learner.config, learner.inputs = config, inputs
    return learner.eval()
