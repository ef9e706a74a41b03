"""Tasks of own data: which sampler draws them."""

from __future__ import annotations

import warnings

import torch

from fastmeta.tasks.examples import Examples
from fastmeta.tasks.inputs import Inputs
from fastmeta.tasks.person_tasks import PersonTasks
from fastmeta.tasks.placement import episodes_of
from fastmeta.tasks.prefetch import Prefetched
from fastmeta.tasks.read._warning import DataWarning
from fastmeta.tasks.read.open_data import Data
from fastmeta.tasks.read.spec import parse
from fastmeta.tasks.regression_tasks import RegressionTasks
from fastmeta.tasks.source import TaskSource
from fastmeta.tasks.task_rows import TaskRows


def tasks_of(
    data: Data,
    split: str,
    device: torch.device,
    *,
    ways: int | None = None,
    shots: int | None = None,
    query_shots: int | None = None,
    rotations: bool = False,
) -> TaskSource:
    """What draws tasks from a split of own data, on `device`: an `EpisodeSampler` of classes, `RegressionTasks`, or
    `PersonTasks`. Arguments as of `~fastmeta.tasks.make_tasks`."""
    sizes = {"ways": ways, "shots": shots, "query_shots": query_shots}
    return with_inputs(_tasks_of(data.part(split), device, **sizes, rotations=rotations), data)


def with_inputs(tasks: TaskSource, data: Data) -> TaskSource:
    """`tasks`, and in their attribute `inputs` how rows of their kind are made, which a run stores."""
    spec, table = parse(data.spec), None
    if data.features is not None:
        label, targets = spec.options.get("label"), data.targets
        targets = None if targets is None else targets.as_json()
        table = {"label": label, "features": data.features.as_json(), "targets": targets}
    background = spec.options.get("background", "white")
    drawn = tasks.tasks if isinstance(tasks, Prefetched) else tasks
    drawn.inputs = Inputs(tasks.kind, tuple(tasks.input_shape), tasks.output_size, background, table)
    return tasks


def _tasks_of(
    part: Examples | TaskRows,
    device: torch.device,
    ways: int | None,
    shots: int | None,
    query_shots: int | None,
    rotations: bool,
) -> TaskSource:
    if isinstance(part, TaskRows):
        if rotations:
            raise ValueError(f"rotations are of classes of images, and {part.name} has rows by task")
        part = part.to(device)
        if part.kind == "regression":
            if ways not in (None, 1):
                raise ValueError(f"{part.name} is regression, it has no ways: leave ways out")
            found = RegressionTasks(part, shots=shots or 10, query_shots=query_shots or 10)
            few = int((part.counts <= found.shots).sum())
            if few:
                told = f"{few} of the {len(part)} tasks of {part.name} have no more than {found.shots} rows"
                warnings.warn(f"{told}, and are left out", DataWarning, stacklevel=4)
            return found
        person = part.by_task.labels.to(device)
        sizes = {"ways": ways or 3, "shots": shots or 1, "query_shots": query_shots or 5}
        return PersonTasks(part.rows, part.targets, person, **sizes)
    ways, shots, query_shots = ways or 5, shots or 1, query_shots or 15
    part = _large_enough(part, ways, shots, query_shots)
    sizes = {"ways": ways, "shots": shots, "query_shots": query_shots}
    return episodes_of(part, **sizes, rotations=rotations, device=device)


def _large_enough(part: Examples, ways: int, shots: int, query_shots: int) -> Examples:
    enough = (part.counts >= shots + query_shots).nonzero().flatten().tolist()
    few = len(part) - len(enough)
    told = f"{few} of the {len(part)} classes of {part.name} have fewer than {shots} + {query_shots} rows"
    if not few or len(enough) < ways:
        if few:
            raise ValueError(f"{told}, and {ways} ways need {ways} that have: ask for fewer shots or query_shots")
        return part
    warnings.warn(f"{told}, and are left out", DataWarning, stacklevel=4)
    return part.only(enough, name=part.name)
