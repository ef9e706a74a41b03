"""Samples of a classification task, taken apart into support and query rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta import TaskBatch


def partition_task(
    data: Tensor, labels: Tensor, shots: int = 1
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`((support, support_labels), (query, query_labels))` of `data` `[B, ...]` and `labels` `[B]`.

    Both are ordered by label. The first `shots` rows of each label are support rows, the others query rows.

    Raises:
        AssertionError: lengths that differ, or labels that are not all there equally often.
    """
    assert data.size(0) == labels.size(0), "data and labels must have as many rows"
    (support, query), (support_labels, query_labels) = _split(data.unsqueeze(0), labels.unsqueeze(0), shots)
    return (support[0], support_labels[0]), (query[0], query_labels[0])


def stack_tasks(tasks, shots: int = 1) -> TaskBatch:
    """What `partition_task` makes of each of `tasks`, pairs `(data [B, ...], labels [B])` as `taskset.sample()` returns
    them, stacked into one batch `[T, S, ...]`, `[T, S]`, `[T, Q, ...]`, `[T, Q]`.

    Raises:
        AssertionError: as `partition_task`.
        ValueError: no tasks, or tasks of different numbers of labels.
    """
    pairs = [tuple(task) for task in tasks]
    if not pairs:
        raise ValueError("tasks must hold at least one task, got none")
    data, labels = (torch.stack(part) for part in zip(*pairs, strict=True))
    return split_tasks(data, labels, shots)


def split_tasks(data: Tensor, labels: Tensor, shots: int) -> TaskBatch:
    """`stack_tasks` of what is stacked already."""
    (support_x, query_x), (support_y, query_y) = _split(data, labels, shots)
    return TaskBatch(support_x, support_y, query_x, query_y)


def _split(data: Tensor, labels: Tensor, shots: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Support and query rows of `data` `[T, B, ...]`, then of `labels` `[T, B]`."""
    tasks, rows = labels.shape
    ways = labels[:1].unique().numel()
    assert rows % max(ways, 1) == 0, "every label needs the same number of rows"
    ordered, order = labels.sort(dim=1, stable=True)
    each = rows // max(ways, 1)
    by_class = ordered.view(tasks, ways, each)
    first = by_class[..., 0]
    alike = bool((by_class == first[..., None]).all()) and bool((first[:, 1:] != first[:, :-1]).all())
    assert alike, "every label needs the same number of rows"
    assert 0 <= shots <= each, f"shots must be at most {each}, the rows of a label, got {shots}"
    at = torch.arange(tasks, device=labels.device).unsqueeze(1)
    grouped = data[at, order.to(data.device)].unflatten(1, (ways, each))
    parts = (slice(None, shots), slice(shots, None))
    support, query = (grouped[:, :, part].flatten(1, 2) for part in parts)
    return (support, query), tuple(by_class[:, :, part].flatten(1, 2) for part in parts)
