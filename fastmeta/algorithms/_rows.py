"""Tasks of unequal size in one batch: which rows are a task's own, and the tasks that have as many rows each.

Tasks with the same numbers of rows are a dense batch of their own. So whatever runs on dense batches runs on padded
ones, group after group, and never sees a padding row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastmeta._trees import cat, first, tree_map
from fastmeta.functional import checks

from .output import MetaOutput

if TYPE_CHECKING:
    from ..tasks import TaskBatch


def check_masks(batch: TaskBatch) -> bool:
    """Whether the batch has tasks with a mask; masks are checked, and every task has a query row to be judged on."""
    if len(batch) == 4:
        return False
    checks.mask("support_mask", batch.support_mask, first(batch.support_x), "support_x")
    checks.mask("query_mask", batch.query_mask, first(batch.query_x), "query_x")
    if batch.query_mask is not None:
        empty = (~batch.query_mask.any(1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"query_mask: task {empty[0]} has no rows")
    return len(first(batch.support_x)) > 0


def without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """`x` `[T, B, ...]` with zeros in the rows that `mask` leaves out."""
    if mask is None:
        return x
    return tree_map(lambda leaf: leaf.masked_fill(~mask.view(*mask.shape, *(1 for _ in leaf.shape[2:])), 0), x)


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


def groups_of(sizes: Sequence[tuple[int, ...]], device: torch.device) -> list[Group]:
    """Groups of the tasks whose sizes are equal."""
    found: dict[tuple[int, ...], list[int]] = {}
    for task, key in enumerate(sizes):
        found.setdefault(key, []).append(task)
    return [Group(torch.tensor(tasks, device=device), key) for key, tasks in found.items()]


def row_counts(*parts: tuple[Tensor, Tensor | None]) -> list[tuple[int, ...]]:
    """How many rows each task has in every part: targets `[T, B, ...]` and their mask."""
    counts = []
    for y, mask in parts:
        tasks, rows = first(y).shape[:2]
        counts.append([rows] * tasks if mask is None else mask.sum(1).tolist())
    return list(zip(*counts, strict=True))


def dense(x: Tensor, mask: Tensor | None, tasks: Tensor, rows: int) -> Tensor:
    """`[t, rows, ...]` of tasks that have so many rows each in `x` `[T, B, ...]`."""
    if mask is None:
        return tree_map(lambda leaf: leaf[tasks], x)
    own = mask[tasks]
    return tree_map(lambda leaf: leaf[tasks][own].unflatten(0, (len(tasks), rows)), x)


def groups_of_batch(batch: TaskBatch) -> list[Group]:
    """Groups of tasks with as many support and as many query rows."""
    return groups_of(row_counts_of(batch), first(batch.support_y).device)


def row_counts_of(batch: TaskBatch) -> list[tuple[int, ...]]:
    return row_counts((batch.support_y, batch.support_mask), (batch.query_y, batch.query_mask))


def dense_batch(batch: TaskBatch, tasks: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The four tensors of tasks that have so many support and query rows."""
    support = (dense(t, batch.support_mask, tasks, sizes[0]) for t in (batch.support_x, batch.support_y))
    query = (dense(t, batch.query_mask, tasks, sizes[1]) for t in (batch.query_x, batch.query_y))
    return (*support, *query)


def in_order(parts: Sequence[Tensor], groups: Sequence[Group]) -> Tensor:
    """The groups' results `[t, ...]` in the order of the tasks, `[T, ...]`."""
    order = torch.cat([group.tasks for group in groups]).argsort()
    return tree_map(lambda leaf: leaf[order], cat(parts, 0, "what the groups of tasks give"))


def with_padding(parts: Sequence[Tensor], groups: Sequence[Group], mask: Tensor | None) -> Tensor:
    """What the groups make of their rows, `[t, rows, ...]`, as `[T, B, ...]`, zeros in rows that are padding. What is
    not of rows, a model's other outputs, stays as it is."""
    if mask is not None:
        parts = [_spread(part, mask[group.tasks]) for part, group in zip(parts, groups, strict=True)]
    return in_order(parts, groups)


def _spread(part: Tensor, mask: Tensor) -> Tensor:
    rows = int(mask[0].sum())

    def spread(leaf: Tensor) -> Tensor:
        return padded(leaf.flatten(0, 1), mask) if leaf.dim() > 1 and leaf.shape[1] == rows else leaf

    return tree_map(spread, part)


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
