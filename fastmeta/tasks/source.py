"""What a source of tasks is."""

from __future__ import annotations

from typing import Protocol

import torch

from fastmeta._trees import tree_map
from fastmeta.batch import TaskBatch


class TaskSource(Protocol):
    """What tasks come from: everything in `fastmeta.tasks`, or your own.

    Attributes:
        kind: "classification" (labels int64 `[T, S]`) or "regression" (targets `[T, S, O]`).
        input_shape: of one example.
        output_size: number of classes of a task, or the target's width O.

    A source may have `sample_part(num_tasks, part, *, generator)` too: the tasks `part`, a slice, of those that
    `sample(num_tasks)` would give, and the generator left as by it. It is for sources whose draws are cheap and whose
    rows are not; of others all are made, and a part kept.
    """

    kind: str
    input_shape: tuple[int, ...]
    output_size: int

    def sample(self, num_tasks: int, *, generator: torch.Generator | None = None) -> TaskBatch:
        """`num_tasks` new tasks on the source's device."""


def sample_part(
    tasks: TaskSource, num_tasks: int, part: slice, *, generator: torch.Generator | None = None
) -> TaskBatch:
    """The tasks `part` of those that `tasks.sample(num_tasks)` would give, and the generator left as by it."""
    if _gives_parts(tasks):
        return tasks.sample_part(num_tasks, part, generator=generator)
    return part_of(tasks.sample(num_tasks, generator=generator), part)


def _gives_parts(tasks: TaskSource) -> bool:
    """Whether it has `sample_part`, and that of its own `sample`: a subclass may have changed the one alone."""
    for kind in type(tasks).__mro__:
        if "sample_part" in vars(kind) or "sample" in vars(kind):
            return "sample_part" in vars(kind)
    return hasattr(tasks, "sample_part")


def part_of(batch: TaskBatch, part: slice) -> TaskBatch:
    """Some of a batch's tasks."""
    return TaskBatch(*(None if field is None else tree_map(lambda t: t[part], field) for field in batch))


def check_source(tasks: TaskSource) -> None:
    """Raise TypeError unless `tasks` has what a source of tasks must have."""
    for name in ("kind", "input_shape", "output_size", "sample"):
        if not hasattr(tasks, name):
            raise TypeError(f"tasks must be a source of tasks, with an attribute {name}; got {type(tasks).__name__}")
