"""What every algorithm's `forward` returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastmeta._trees import tree_map

from ..engines import check_prediction

if TYPE_CHECKING:
    from ..engines import Loss


class MetaOutput(NamedTuple):
    """The result of one task batch.

    `loss` is the mean of the query losses over tasks, each times its weight where `forward` is given weights, a
    differentiable scalar: call `.backward()` on it.
    `task_loss` `[T]` holds the tasks' own losses, `accuracy` `[T]` their query accuracy (None for
    regression), `logits` `[T, Q, C]` the query predictions (None where a fused loss never forms them). In rows that
    `query_mask` leaves out logits are 0. Where the model returns several tensors, `logits` holds them as it returns
    them, with `T` in front of each one's sizes, and there is no accuracy.

    Column c of the logits is class c; -inf where a learner on embeddings has a task that is without. `classes` int64
    `[T, C]` is there where they are not, for labels that are negative or above 8191: the label that each column stands
    for; a task with fewer classes repeats its last, with logits of -inf.
    """

    loss: Tensor
    task_loss: Tensor
    accuracy: Tensor | None = None
    logits: Tensor | None = None
    classes: Tensor | None = None


def over_tasks(
    task_loss: Tensor, accuracy: Tensor | None = None, logits: Tensor | None = None, *, mean: Tensor | None = None
) -> MetaOutput:
    """The result of all tasks: here alone their losses `[T]` become one. `mean` is that of the losses where it is known
    already."""
    return MetaOutput(task_loss.mean() if mean is None else mean, task_loss, accuracy, logits)


def over_rows(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Means `[T]` over the tasks' own rows of `values` `[T, B, ...]`, which `mask` of that shape tells; NaN of none."""
    values = values.flatten(1)
    return values.mean(1) if mask is None else values.masked_fill(~mask.flatten(1), 0).sum(1) / mask.flatten(1).sum(1)


def classified(
    task_loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    class_dim: int = -1,
    mean: Tensor | None = None,
) -> MetaOutput:
    """The result of logits `[T, Q, N]`, whose losses are known, and labels `[T, Q]`; of the rows in `mask` `[T, Q]`."""
    accuracy = over_rows((logits.argmax(class_dim) == labels).to(task_loss.dtype), mask)
    return over_tasks(task_loss, accuracy, logits, mean=mean)


def judged(
    loss: Loss,
    logits: Tensor,
    query_y: Tensor,
    task_loss: Tensor | None = None,
    mean: Tensor | None = None,
    mask: Tensor | None = None,
) -> MetaOutput:
    """The result of predictions `[T, Q, C]`; `task_loss` `[T]` and its mean where they are known already, as they have
    to be of rows in `mask` `[T, Q]`."""
    if task_loss is None:
        check_prediction(loss, logits, query_y, "query_y")
        task_loss = loss.per_task(logits, query_y)
    if isinstance(logits, Tensor) and isinstance(query_y, Tensor) and query_y.dtype == torch.int64:
        at = loss.class_dim % logits.dim()
        if query_y.shape == (*logits.shape[:at], *logits.shape[at + 1 :]):
            counted = loss.counted(query_y, logits.shape[at])
            if mask is not None:
                counted = mask if counted is None else counted & mask
            return classified(task_loss, logits, query_y, counted, class_dim=at, mean=mean)
    return over_tasks(task_loss, logits=logits, mean=mean)


def weighted(output: MetaOutput, weights: Tensor | None) -> MetaOutput:
    """The same with the mean of the tasks' losses times their `weights` `[T]` for its loss."""
    if weights is None:
        return output
    return output._replace(loss=(weights.to(output.task_loss.dtype) * output.task_loss).mean())


def detached(output: MetaOutput) -> MetaOutput:
    """The same without a graph."""
    return MetaOutput(*(None if field is None else tree_map(Tensor.detach, field) for field in output))
