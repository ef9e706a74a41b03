"""What the algorithms that work on an encoder's embeddings share: one pass through the encoder, checks, the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta import values
from fastmeta._trees import arguments, cat, described, first, named_leaves, tree_map
from fastmeta.functional import checks

from ..batch import TaskBatch
from ._arguments import check_inputs, check_size, check_tasks, check_weights
from ._blocks import call
from ._chunks import ChunkedLearner
from ._classes import Classes, classes_of, ordinary_ways
from ._misfit import raise_misfit
from ._norms_of_all import norms_of_all
from ._rows import (
    Group,
    check_masks,
    dense,
    groups_of,
    in_order,
    joined,
    padded,
    row_counts,
    valid_rows,
)
from ._targets import check_targets, cross_entropy
from .output import MetaOutput, classified, over_tasks, weighted


class TaskGroups(NamedTuple):
    """What `adapt` returns for tasks that are not all alike: the states of groups of tasks that are, which tasks int64
    `[t]` each has, and the tasks' classes (None for regression)."""

    states: list[Any]
    groups: list[Group]
    classes: Classes | None


class EmbeddingLearner(ChunkedLearner):
    """An encoder, a state fitted to the support embeddings, predictions from the query embeddings.

    A subclass says what the state is in `_fit(features, targets, ways)` and what it predicts in
    `_score(state, features)`; `features` are embeddings `[T, B, D]`, `targets` labels in [0, ways), each with rows in
    every task. Both without a loop over tasks. Tasks with other labels, missing classes or padding rows come to it
    renumbered, in groups that are alike.

    Classes of a task are those of its support rows, whatever int64 labels these have; a task may have fewer than
    others. `ways` is the most that a task may have, a ValueError beyond; logits of which column c is class c have at
    least so many columns.
    Labels are looked at, for which a GPU is waited for once per call. Where they cannot be (what is compiled, captured
    in a CUDA graph or traced, and on a GPU without `check_labels`) and there are no masks, every task must have the
    classes 0 to N - 1, all of them, with N = `ways` or else the largest support label plus one; so must tasks that
    `torch.func.vmap` maps over, where others are refused.

    The encoder runs once, over all support and query rows of all tasks together. So a batch norm in train mode uses
    the statistics of the whole task batch, and in eval mode its running statistics: evaluation is not transductive. It
    may take several tensors, as a model of `MAML` may, and returns one.

    `task_chunk`, an attribute that is None, is as the argument of `MAML`, while gradients are on; there are no logits
    then. A batch norm in train mode sees the rows of one chunk after the other: its statistics, and so the gradient,
    are other ones.
    """

    _feature_maps = False  # whether the encoder may return [B, C, H, W]
    _classifies = True  # or there are targets in place of labels

    def __init__(self, encoder: nn.Module, ways: int | None):
        super().__init__()
        self.encoder = values.module("encoder", encoder)
        self.ways = check_size("ways", ways, or_none=True)

    def adapt(self, support_x: Tensor, support_y: Tensor, support_mask: Tensor | None = None) -> Any:
        """The state of support sets `[T, S, ...]` with labels int64 `[T, S]` (regression: targets `[T, S, O]`).

        Classes of a task are those of its support rows, any labels. `support_mask` bool `[T, S]`: False for rows that
        are padding. Tasks that are not all alike make a state of `TaskGroups`.
        """
        support_mask = check_examples("support_x", support_x, support_mask, "support_mask")
        ways, classes = self._classes(support_x, support_y, support_mask=support_mask)
        features = self._encode_as("support_x", support_x, support_mask)
        if support_mask is None and classes is None:
            return self._fit(features, support_y, ways)
        y = support_y if classes is None else classes.support_y
        groups = _alike(classes, [(support_y, support_mask)])
        states = [
            self._fit(dense(features, support_mask, tasks, rows), dense(y, support_mask, tasks, rows), ways)
            for tasks, (rows, ways) in groups
        ]
        return TaskGroups(states, groups, classes)

    def predict(self, state: Any, query_x: Tensor, query_mask: Tensor | None = None) -> Tensor:
        """Logits `[T, Q, C]` (regression: predictions `[T, Q, O]`) for `query_x` `[T, Q, ...]`; zeros in rows where
        `query_mask` bool `[T, Q]` is False.

        Column c is class c, -inf where a task has no such class; C is the largest label plus one, or `ways` if that is
        more. Where the state's labels are negative or above 8191, columns are each task's classes in order,
        `state.classes.labels`.
        """
        query_mask = check_examples("query_x", query_x, query_mask, "query_mask")
        tasks = None if isinstance(state, TaskGroups) else tasks_of(state, self._num_tasks)
        features = self._encode_as("query_x", query_x, query_mask)
        if tasks is not None:
            check_tasks(features, tasks)
            logits = self._score_rows(state, features, query_mask)
            return logits if query_mask is None else logits.masked_fill(~query_mask.unsqueeze(2), 0)
        check_tasks(features, sum(len(group.tasks) for group in state.groups))
        parts = [
            self._score_rows(part, features[tasks], None if query_mask is None else query_mask[tasks])
            for part, (tasks, _) in zip(state.states, state.groups, strict=True)
        ]
        logits = in_order(_with_absent(parts), state.groups)
        if state.classes is not None:
            return state.classes.wide(logits, query_mask)
        return logits if query_mask is None else logits.masked_fill(~query_mask.unsqueeze(2), 0)

    def forward(self, batch: TaskBatch, weights: Tensor | None = None) -> MetaOutput:
        """Fit to every task's support set and judge on its query set. With `weights` `[T]` each task's loss counts that
        often in `loss`, which stays a mean over `T`; they may require gradients.

        Classes of a task are those of its support rows, any labels; columns of the logits as in `predict`, and
        `MetaOutput.classes` says what they stand for where they are not the labels themselves. Rows that the batch's
        masks leave out are not looked at.

        Raises:
            ValueError: a task without support rows, or with more classes than `ways`; a query row of a class that has
                no support row. TypeError: labels that are not int64, masks that are not bool.
        """
        batch = TaskBatch.of(batch)
        check_examples("support_x", batch[0])
        check_examples("query_x", batch[2])
        check_weights(weights, batch)
        try:
            trained = [p for p in self.parameters() if p.requires_grad]
            if torch.is_grad_enabled() and trained and self._in_chunks(batch, weights):
                self._check_tasks(batch)  # where errors know a task's place in the batch
                return self._chunked_loss(self._chunk, batch, weights, self.task_chunk, trained)
            return weighted(self._all_tasks(batch), weights)
        except Exception as error:
            raise_misfit(error, "encoder", self.encoder, {"support_x": batch[0], "query_x": batch[2]})
            raise

    def _chunk(self, *parts: Tensor | None) -> MetaOutput:
        *batch, weights = parts
        return weighted(self._all_tasks(TaskBatch(*batch)), weights)._replace(logits=None, classes=None)

    def _check_tasks(self, batch: TaskBatch) -> None:
        self._classes(*(batch if self._check_batch(batch) else batch[:4]))

    def _all_tasks(self, batch: TaskBatch) -> MetaOutput:
        """`forward` from the examples on."""
        masked = self._check_batch(batch)
        ways, classes = self._classes(*(batch if masked else batch[:4]))
        x = cat([batch.support_x, batch.query_x], 1)
        features = self._encode(x, both_masks(batch) if masked else None)
        support, query = features.split([first(part).shape[1] for part in (batch.support_x, batch.query_x)], 1)
        if classes is None and not masked:
            return self._tasks(support, batch.support_y, query, batch.query_y, ways)
        output = self._unlike_tasks(batch._replace(support_x=support, query_x=query), classes)
        if classes is None or output.logits is None:
            return output
        return output._replace(logits=classes.wide(output.logits, batch.query_mask), classes=classes.of_columns)

    def _unlike_tasks(self, batch: TaskBatch, classes: Classes | None) -> MetaOutput:
        """`forward` of embeddings in place of examples, for tasks that are not all alike: each group of those that are
        by itself. Logits `[T, Q, N]` by the classes' numbers."""
        masks = batch.support_mask, batch.query_mask
        groups = _alike(classes, [(batch.support_y, masks[0]), (batch.query_y, masks[1])])
        if classes is not None:
            batch = batch._replace(support_y=classes.support_y, query_y=classes.query_y)
        outputs = []
        for tasks, (rows, queries, ways) in groups:
            support, support_y = (dense(t, masks[0], tasks, rows) for t in (batch.support_x, batch.support_y))
            query, query_y = (dense(t, masks[1], tasks, queries) for t in (batch.query_x, batch.query_y))
            outputs.append(self._tasks(support, support_y, query, query_y, ways))
        if outputs[0].logits is not None:
            logits = _with_absent([output.logits for output in outputs])
            outputs = [output._replace(logits=part) for output, part in zip(outputs, logits, strict=True)]
        return joined(outputs, groups, masks[1])

    def _tasks(
        self, support: Tensor, support_y: Tensor, query: Tensor, query_y: Tensor, ways: int | None
    ) -> MetaOutput:
        """`forward` from the embeddings on."""
        return self._judge(self._score(self._fit(support, support_y, ways), query), query_y)

    def _fit(self, features: Tensor, targets: Tensor, ways: int | None) -> Any:
        raise NotImplementedError

    def _score(self, state: Any, features: Tensor) -> Tensor:
        raise NotImplementedError

    def _score_rows(self, state: Any, features: Tensor, mask: Tensor | None) -> Tensor:
        """`_score` where some rows may be padding: of zeros, and what comes of them is not used."""
        return self._score(state, features)

    def _check_batch(self, batch: TaskBatch) -> bool:
        """Whether the batch has masks, after checks of its examples and masks."""
        support_x, query_x = batch.support_x, batch.query_x
        values.tensor("support_y", batch.support_y)
        values.tensor("query_y", batch.query_y)
        support, query = dict(named_leaves(support_x, "support_x")), dict(named_leaves(query_x, "query_x"))
        if len(support) != len(query):
            raise ValueError(f"support_x and query_x must hold the same tensors, got {[*support]} and {[*query]}")
        for (name, s), (query_name, q) in zip(support.items(), query.items(), strict=True):
            if s.shape[2:] != q.shape[2:] or s.shape[0] != q.shape[0]:
                raise ValueError(
                    f"{name} and {query_name} must agree in tasks and example shape, got {tuple(s.shape)} "
                    f"and {tuple(q.shape)}"
                )
            checks.same_kind(name, s, **{query_name: q})
        return check_masks(batch)

    def _num_tasks(self, state: Any) -> int:
        return state[0].shape[0]

    def _judge(self, logits: Tensor, query_y: Tensor) -> MetaOutput:
        return classified(cross_entropy(logits, query_y), logits, query_y)

    def _classes(
        self,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor | None = None,
        query_y: Tensor | None = None,
        support_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
    ) -> tuple[int | None, Classes | None]:
        """N, if all tasks have the classes 0 to N - 1 and every row is one of theirs; else what classes they have.
        Labels are checked. Neither in regression."""
        if not self._classifies:
            return None, None
        checks.labels("support_y", support_y, "[T, S]", first(support_x), "support_x")
        if query_y is not None:
            checks.labels("query_y", query_y, "[T, Q]", first(query_x), "query_x")
        if (support_mask is None and query_mask is None) or len(support_y) == 0:
            ways = ordinary_ways(support_y, query_y, self.ways)
            if ways is not None:
                return ways, None
        return None, classes_of(support_y, query_y, support_mask, query_mask, self.ways)

    def _encode_as(self, name: str, x: Tensor, mask: Tensor | None) -> Tensor:
        """`_encode` of the argument `name`."""
        try:
            return self._encode(x, mask)
        except Exception as error:
            raise_misfit(error, "encoder", self.encoder, {name: x})
            raise

    def _encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embeddings `[T, B, D]`; of rows that are padding, which the encoder does not see, zeros."""
        returns, dims = "embeddings [B, D]", (2,)
        if self._feature_maps:
            returns, dims = "embeddings [B, D] or feature maps [B, C, H, W]", (2, 4)
        return by_rows(self.encoder, "encoder", returns, x, dims=dims, mask=mask)


def tasks_of(state: Any, count: Callable[[Any], int]) -> int:
    """How many tasks a state is of; TypeError where it is none of this learner's."""
    try:
        return count(state)
    except (TypeError, AttributeError, IndexError, KeyError):
        raise TypeError(f"state must be what adapt returns, got {type(state).__name__}") from None


def check_examples(name: str, x: Tensor, mask: Tensor | None = None, mask_name: str = "") -> Tensor | None:
    """Raise unless `x` is `[T, B, ...]`, and `mask`, where there is one, bool `[T, B]`. The mask, where there is a
    task."""
    whole = isinstance(x, Tensor)
    if not whole:
        name, x = check_inputs(name, x)
    values.tensor(name, x)
    # what an nn.Embedding takes for an example, a number, has no dimensions of its own
    if x.dim() < 2 or (whole and x.dim() == 2 and x.is_floating_point()):
        raise ValueError(f"{name} must have shape [T, B, ...], got {list(x.shape)}")
    checks.mask(mask_name, mask, x, name)
    return mask if x.shape[0] else None


def _alike(classes: Classes | None, rows: Sequence[tuple[Tensor, Tensor | None]]) -> list[Group]:
    """Groups of tasks with equal numbers of rows, which targets and masks tell, and of classes (regression: 0)."""
    counts = row_counts(*rows)
    ways = [0] * len(counts) if classes is None else classes.counts.tolist()
    return groups_of([(*of_task, n) for of_task, n in zip(counts, ways, strict=True)], rows[0][0].device)


def _with_absent(logits: Sequence[Tensor]) -> list[Tensor]:
    """Logits `[t, B, n]` of all groups with as many columns, -inf in those added."""
    most = max(part.shape[2] for part in logits)
    return [F.pad(part, (0, most - part.shape[2]), value=-torch.inf) for part in logits]


def both_masks(batch: TaskBatch) -> Tensor:
    """`[T, S + Q]`: which of the support and query rows are the tasks' own."""
    parts = (batch.support_mask, first(batch.support_x)), (batch.query_mask, first(batch.query_x))
    return torch.cat([x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask for mask, x in parts], 1)


def by_rows(
    module: nn.Module,
    name: str,
    returns: str,
    x: Tensor,
    *,
    dims: Sequence[int] = (2,),
    mask: Tensor | None = None,
    **beside: Tensor,
) -> Tensor:
    """`[T, B, ...]`: what `module` makes of the rows of all tasks together, of inputs `[T, B, ...]`; zeros for those
    that `mask` `[T, B]` leaves out.

    `name` and `returns` say in an error what the module is and should return, a tensor with so many dimensions.
    `beside` holds more arguments `[T, B, ...]`: the last, or by their names where the inputs are a dict.
    """
    rows = {key: valid_rows(value, mask) for key, value in beside.items()}
    args, kwargs = arguments(tree_map(lambda leaf: valid_rows(leaf, mask), x), **rows)
    norms = norms_of_all()
    if norms is None:
        features = call(module, args, kwargs)
    else:
        with norms:
            features = module(*args, **kwargs)
    if not isinstance(features, Tensor):
        raise ValueError(f"{name} must return {returns}, got {described(features)}")
    if features.dim() not in dims:
        raise ValueError(f"{name} must return {returns}, got shape {tuple(features.shape)}")
    return features.unflatten(0, first(x).shape[:2]) if mask is None else padded(features, mask)


def squared_error(prediction: Tensor, target: Tensor) -> MetaOutput:
    """The output of a regression: the mean squared error of each task."""
    check_targets("query_y", target, prediction)
    if target.shape != prediction.shape:
        raise ValueError(f"query_y must have shape [T, Q, O] = {list(prediction.shape)}, got {list(target.shape)}")
    return over_tasks((prediction - target).square().mean((1, 2)), logits=prediction)
