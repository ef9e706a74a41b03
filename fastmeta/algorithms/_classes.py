"""Which classes a task has: those of its support rows, whatever int64 labels they bear.

A task's classes are numbered from 0 in the order of their labels. What learners compute with are these numbers, so that
a task gets the same whatever its classes are called; labels come back in as the columns of the logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from fastmeta import functional
from fastmeta.dispatch.labels import all_levels, readable

_MOST_COLUMNS = 8192  # with labels below, column c of the logits is class c
_FEW = 256  # labels for which Python is faster than a kernel's launches


class Classes(NamedTuple):
    """The classes of `T` tasks, of which none has more than N.

    `support_y` `[T, S]` and `query_y` `[T, Q]` hold the numbers of the rows' classes in their task, those of padding
    rows N and 0. A task with fewer than N has its last label repeated in `labels` `[T, N]`; `absent` bool `[T, N]` is
    true there. `columns` is the width of logits whose column c is class c, None where labels are no columns.
    """

    support_y: Tensor
    query_y: Tensor | None
    labels: Tensor
    absent: Tensor
    columns: int | None

    @property
    def ways(self) -> int:
        return self.labels.shape[1]

    @property
    def counts(self) -> Tensor:
        """How many classes each task has, `[T]`."""
        return (~self.absent).sum(1)

    def means(self, features: Tensor) -> Tensor:
        """Class means `[T, N, D]` of support embeddings `[T, S, D]`: padding rows have a class of their own, the last,
        which is dropped."""
        return functional.class_prototypes(features, self.support_y, self.ways + 1)[:, :-1]

    def without_absent(self, logits: Tensor) -> Tensor:
        """Logits `[T, Q, N]` of the tasks' own numbers, -inf for those that a task has not."""
        return logits.masked_fill(self.absent.unsqueeze(1), -torch.inf)

    def wide(self, logits: Tensor, query_mask: Tensor | None = None) -> Tensor:
        """Logits `[T, Q, N]` by number as they are given to the user: a column for each label, -inf for what is no
        class of the task, zeros in padding rows."""
        logits = self.without_absent(logits)
        if self.columns is not None:
            places = self.labels.masked_fill(self.absent, self.columns).unsqueeze(1).expand_as(logits)
            empty = logits.new_full((*logits.shape[:2], self.columns + 1), -torch.inf)
            logits = empty.scatter(2, places, logits)[..., :-1]
        return logits if query_mask is None else logits.masked_fill(~query_mask.unsqueeze(2), 0)

    @property
    def of_columns(self) -> Tensor | None:
        """What `MetaOutput.classes` says."""
        return self.labels if self.columns is None else None


def ordinary_ways(support_y: Tensor, query_y: Tensor | None, ways: int | None) -> int | None:
    """N where every task has the classes 0 to N - 1, all of them, as `ways` says if it is given; else None.

    Labels that cannot be looked at (see `readable`) are taken to be so; those of tasks that `vmap` maps over have to
    be. Looking waits for a GPU once.
    """
    every_y, every_query_y = all_levels(support_y), None if query_y is None else all_levels(query_y)
    if not readable(every_y):
        if ways is None and torch.compiler.is_exporting():
            raise ValueError("torch.export cannot look at labels for the number of classes: give the learner ways=N")
        if ways is None and torch.compiler.is_compiling():
            return _outside_the_graph(every_y, every_query_y, ways)
        return int(support_y.max()) + 1 if ways is None else ways
    found = _ordinary_ways(every_y, every_query_y, ways)
    if found is None and (every_y is not support_y or every_query_y is not query_y):
        raise ValueError(
            "support_y: tasks that torch.func.vmap maps over must have the classes 0 to N - 1 each, all of them, with "
            f"N = {'one number' if ways is None else f'ways = {ways}'}, and queries of these"
        )
    return found


def _ordinary_ways(support_y: Tensor, query_y: Tensor | None, ways: int | None) -> int | None:
    if support_y.numel() == 0 or (query_y is not None and query_y.numel() == 0):
        query_y = None
    if support_y.numel() == 0:  # without a task there is no class: one column, for there to be a largest
        return (ways or 1) if len(support_y) == 0 else None
    if support_y.is_cuda:
        counts = [_count_on_device(support_y)]
        counts += [] if query_y is None else [torch.stack(torch.aminmax(query_y))]
        found, *bounds = torch.cat(counts).tolist()
    else:
        found = _count(support_y)
        bounds = [int(bound) for bound in torch.aminmax(query_y)] if found and query_y is not None else []
    if not found or (ways is not None and found != ways) or (bounds and not 0 <= bounds[0] <= bounds[1] < found):
        return None
    return found


# A number of classes that the labels tell breaks a graph anyway; so the labels are looked at there. Not
# torch.compiler.disable, which imports all of dynamo at once: two seconds of every `import fastmeta`.
_outside_the_graph = _disable_dynamo(_ordinary_ways)


def _count(labels: Tensor) -> int:
    """The number of classes of every task, 0 where they are not all of 0 to that number."""
    if labels.numel() <= _FEW:
        rows = [set(row) for row in labels.tolist()]
        classes = set(range(len(rows[0])))
        return len(classes) if all(row == classes for row in rows) else 0
    low, high = (int(bound) for bound in torch.aminmax(labels))
    if low != 0 or high >= labels.shape[1]:  # there are no more classes than rows
        return 0
    present = labels.new_zeros((len(labels), high + 1), dtype=torch.bool).scatter_(1, labels, True)
    return high + 1 if present.all() else 0


def _count_on_device(labels: Tensor) -> Tensor:
    """The same, `[1]`, without waiting."""
    low, high = torch.aminmax(labels)
    present = labels.new_zeros((len(labels), labels.shape[1] + 1), dtype=torch.bool)
    present.scatter_(1, labels.clamp(0, labels.shape[1]), True)
    fewest = present.sum(1).amin()
    return torch.where((low == 0) & (fewest == high + 1), fewest, 0).unsqueeze(0)


def classes_of(
    support_y: Tensor,
    query_y: Tensor | None = None,
    support_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    ways: int | None = None,
) -> Classes:
    """The classes of tasks with any labels `[T, S]` and `[T, Q]` and rows that are padding.

    Raises:
        ValueError: a task without support rows, or with more classes than `ways`; a query row of a class that has no
            support row.
    """
    device = support_y.device
    # on the host: a few small tables, each step of which would else wait for the device
    y, q, mask, query_mask = (None if t is None else t.cpu() for t in (support_y, query_y, support_mask, query_mask))
    present = torch.ones_like(y, dtype=torch.bool) if mask is None else mask
    empty = (~present.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"{'support_y' if mask is None else 'support_mask'}: task {empty[0]} has no support rows")
    # a padding row passes for one of the task's own: it makes no class
    y = torch.where(present, y, y.gather(1, present.int().argmax(1, keepdim=True)))
    ordered, order = y.sort(1)
    rank = torch.nn.functional.pad((ordered.diff(dim=1) != 0).cumsum(1), (1, 0))
    counts = rank[:, -1] + 1
    most = int(counts.max())
    if ways is not None and most > ways:
        raise ValueError(f"support_y: task {int(counts.argmax())} has {most} classes, more than ways = {ways}")
    labels = ordered[:, -1:].repeat(1, most).scatter(1, rank, ordered)
    numbers = torch.empty_like(y).scatter(1, order, rank).masked_fill(~present, most)
    if q is not None:
        q = _numbered(q, query_mask, labels)
    low, high = int(labels.min()), int(labels.max())
    columns = max(high + 1, ways or 0) if 0 <= low and high < _MOST_COLUMNS else None
    absent = torch.arange(most) >= counts.unsqueeze(1)
    return Classes(*(None if t is None else t.to(device) for t in (numbers, q, labels, absent)), columns)


def _numbered(query_y: Tensor, query_mask: Tensor | None, labels: Tensor) -> Tensor:
    numbers = torch.searchsorted(labels, query_y.contiguous()).clamp_max(labels.shape[1] - 1)
    strange = labels.gather(1, numbers) != query_y
    if query_mask is not None:
        strange &= query_mask
        numbers = numbers.masked_fill(~query_mask, 0)
    if strange.any():
        task, row = strange.nonzero()[0].tolist()
        raise ValueError(
            f"query_y: task {task} has a row of class {int(query_y[task, row])}, which has no support row"
        )
    return numbers
