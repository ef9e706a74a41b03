"""Tasks of unequal size in one batch: which rows are a task's own, and the tasks that have as many rows each.

Tasks with the same numbers of rows are a dense batch of their own. So whatever runs on dense batches runs on padded
ones, group after group, and never sees a padding row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastmeta import values
from fastmeta._trees import first
from fastmeta.functional import checks

from .output import MetaOutput

if TYPE_CHECKING:
    from ..tasks import TaskBatch


def check_mask(name: str, mask: Tensor | None, like_name: str, like: Tensor) -> None:
    """Raise TypeError or ValueError unless `mask` is None or bool `[T, B]`, as the rows of `like` `[T, B, ...]`."""
    if mask is None:
        return
    values.tensor(name, mask, "a bool tensor")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {values.dtype_of(mask)}")
    if mask.shape != like.shape[:2]:
        raise ValueError(
            f"{name} must have shape {list(like.shape[:2])} to match {like_name}, got {list(mask.shape)}"
        )
    checks.same_device(name, mask, like_name, like)


def check_masks(batch: TaskBatch) -> bool:
    """Whether the batch has a mask; those it has are checked, and every task has a query row to be judged on."""
    if len(batch) == 4:
        return False
    check_mask("support_mask", batch.support_mask, "support_x", first(batch.support_x))
    check_mask("query_mask", batch.query_mask, "query_x", first(batch.query_x))
    if batch.query_mask is not None:
        check_rows("query_mask", batch.query_mask)
    return True


def check_rows(name: str, mask: Tensor) -> None:
    """Raise ValueError unless every task has a row."""
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"{name}: task {empty[0]} has no rows")


def valid_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """The tasks' own rows `[R, ...]` of `x` `[T, B, ...]`, one task after the other."""
    return x.flatten(0, 1) if mask is None else x[mask]


def padded(rows: Tensor, mask: Tensor) -> Tensor:
    """`[T, B, ...]` of what `valid_rows` took out, zeros in between."""
    places = mask.flatten().nonzero().squeeze(1)
    return rows.new_zeros(mask.numel(), *rows.shape[1:]).index_copy(0, places, rows).unflatten(0, mask.shape)


class Group(NamedTuple):
    """Tasks, int64 `[t]`, that have equal sizes."""

    tasks: Tensor
    sizes: tuple[int, ...]


def groups_of(sizes: Sequence[Tensor], device: torch.device) -> list[Group]:
    """Groups of the tasks whose sizes, each `[T]`, are all equal."""
    found: dict[tuple[int, ...], list[int]] = {}
    for task, key in enumerate(torch.stack(list(sizes), 1).tolist()):
        found.setdefault(tuple(key), []).append(task)
    return [Group(torch.tensor(tasks, device=device), key) for key, tasks in found.items()]


def row_counts(y: Tensor, mask: Tensor | None) -> Tensor:
    """How many rows each task has, `[T]`."""
    return torch.full(y.shape[:1], y.shape[1], device=y.device) if mask is None else mask.sum(1)


def dense(x: Tensor, mask: Tensor | None, tasks: Tensor, rows: int) -> Tensor:
    """`[t, rows, ...]` of tasks that have so many rows each in `x` `[T, B, ...]`."""
    return x[tasks] if mask is None else x[tasks][mask[tasks]].unflatten(0, (len(tasks), rows))


def in_order(parts: Sequence[Tensor], groups: Sequence[Group]) -> Tensor:
    """The groups' results `[t, ...]` in the order of the tasks, `[T, ...]`."""
    return torch.cat(list(parts))[torch.cat([group.tasks for group in groups]).argsort()]


def with_padding(parts: Sequence[Tensor], groups: Sequence[Group], mask: Tensor | None) -> Tensor:
    """What the groups make of their rows, `[t, rows, ...]`, as `[T, B, ...]`, zeros in rows that are padding."""
    if mask is not None:
        parts = [padded(part.flatten(0, 1), mask[g.tasks]) for part, g in zip(parts, groups, strict=True)]
    return in_order(parts, groups)


def joined(outputs: Sequence[MetaOutput], groups: Sequence[Group], query_mask: Tensor | None) -> MetaOutput:
    """The result of all tasks from those of the groups, each of whose losses counts for as many tasks as it has."""
    tasks = sum(len(group.tasks) for group in groups)
    loss = sum(output.loss * (len(group.tasks) / tasks) for output, group in zip(outputs, groups, strict=True))
    accuracies, logits = ([getattr(o, field) for o in outputs] for field in ("accuracy", "logits"))
    return MetaOutput(
        loss,
        in_order([output.task_loss for output in outputs], groups),
        None if accuracies[0] is None else in_order(accuracies, groups),
        None if logits[0] is None else with_padding(logits, groups, query_mask),
    )
