"""What a source of tasks is."""

from __future__ import annotations

from typing import Protocol

import torch

from fastmeta.batch import TaskBatch


class TaskSource(Protocol):
    """What tasks come from: everything in `fastmeta.tasks`, or your own.

    Attributes:
        kind: "classification" (labels int64 `[T, S]`) or "regression" (targets `[T, S, O]`).
        input_shape: of one example.
        output_size: number of classes of a task, or the target's width O.
    """

    kind: str
    input_shape: tuple[int, ...]
    output_size: int

    def sample(self, num_tasks: int, *, generator: torch.Generator | None = None) -> TaskBatch:
        """`num_tasks` new tasks on the source's device."""


def check_source(tasks: TaskSource) -> None:
    """Raise TypeError unless `tasks` has what a source of tasks must have."""
    for name in ("kind", "input_shape", "output_size", "sample"):
        if not hasattr(tasks, name):
            raise TypeError(f"tasks must be a source of tasks, with an attribute {name}; got {type(tasks).__name__}")
