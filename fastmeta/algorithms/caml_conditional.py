"""CAML as conditional modulation: a network adapts to each task by an inner loop, and a metric space of the classes
shifts and scales its features all the while.

Two papers bear the name CAML. This is the one of 2019; that of 2024 is in `caml_incontext`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastmeta import functional, values
from fastmeta._trees import arguments, cat, first, named_leaves, split, tree_map

from ..engines import PLAIN, InnerLoop, Steps, module_engine
from ..engines.vmap import buffers_per_task
from ._arguments import check_number
from ._classes import classes_of, ordinary_ways
from ._embedding import both_masks, by_rows
from ._inner_loop import InnerLoopAlgorithm, adapted_convolutions
from ._inner_lr import rates_like
from ._misfit import called, raise_misfit
from ._rows import dense, dense_batch, groups_of_batch, joined
from ._targets import cross_entropy
from .film import FiLM
from .output import MetaOutput, judged, over_tasks, weighted

if TYPE_CHECKING:
    from ..tasks import TaskBatch


class ConditionalCAML(InnerLoopAlgorithm):
    """CAML, conditional class-aware meta-learning (Jiang, Havaei, Varno, Chartrand, Chapados, Matwin 2019, "Learning to
    Learn with Conditional Class Dependencies", section 3).

    A metric space `f`, an encoder trained as a prototypical network, knows which classes are alike. Where an example
    lies in it, `f(x)`, conditions how the base network sees the example: every normalised feature map becomes
    `(1 + gamma) * map + beta`, with `gamma` and `beta` computed from `f(x)` (their conditionally transformed block).
    The base network's own weights `w` adapt to a task as in MAML, by `inner_steps` steps
    `w <- w - inner_lr * grad_w L_support(w)`; the metric space and the transformations do not. The outer loop trains
    all of it on the query loss at the adapted weights, second derivatives included: the metric space too, through
    the conditions of the query rows and, by way of the inner gradients, of the support rows.

    Departures: the mean over tasks, where the paper sums. The paper trains the metric space beforehand, on the training
    classes: do so with `ProtoNet(encoder)`, and freeze the encoder if the outer loop is to leave it as it is; or train
    all at once, with `metric_weight`. The transformations are those of the `model`: `FiLM`'s perceptron around 1 in
    `FiLMConv4` and `FiLMMLP`, without the skip connections or regularisers that one may put there.

    Args:
        encoder: the metric space `f`: any module from examples `[B, ...]` to embeddings `[B, D]`. It runs once, over
            all rows of all tasks: its batch norms use the statistics of the whole task batch in train mode, and their
            running statistics in eval mode.
        model: the base network, from examples `[B, ...]` and conditions `[B, D]` to predictions `[B, C]`: `FiLMConv4`
            with `outputs` for images, `FiLMMLP` for vectors, or your own. Where an example is several tensors, the
            condition comes last, or as the keyword argument `condition` where they are a dict. Batch norms see one
            task's rows, support and query apart, as in `MAML`: build it with `track_running_stats=False`. Parameters
            with `requires_grad=False` are neither adapted nor trained.
        adapts: which of the base network's parameters adapt, a callable from a name to a bool. None (default): all but
            those of its `FiLM` layers.
        inner_lr: step size in the inner loop, 0.1 by default.
        inner_steps: `K >= 0`, 5 by default. May be set anew between calls.
        metric_weight: what the loss of a prototypical network on the embeddings counts beside the query loss, in train
            mode alone; 0 by default. With more, targets are labels int64 in `[0, C)`, and a query's class has support
            rows.
        first_order: drop the second derivatives.
        loss: as in `MAML`.
        task_chunk: at most this many tasks at a time in the inner loop, to bound memory; as in `MAML`. The encoder runs
            for all tasks at once all the same.

    Raises:
        TypeError, ValueError: arguments out of range, no parameter that adapts; an encoder that does not return
            `[B, D]`; inputs and targets that do not fit together.
    """

    def __init__(
        self,
        encoder: nn.Module,
        model: nn.Module,
        *,
        adapts: Callable[[str], bool] | None = None,
        inner_lr: float = 0.1,
        inner_steps: int = 5,
        metric_weight: float = 0.0,
        first_order: bool = False,
        loss: str | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
        task_chunk: int | str | None = None,
    ):
        super().__init__(model, inner_steps=inner_steps, first_order=first_order, loss=loss, task_chunk=task_chunk)
        if not (adapts is None or callable(adapts)):
            raise TypeError(f"adapts must be None or a callable(name) -> bool, got {adapts!r}")
        self.inner_lr = check_number("inner_lr", inner_lr, 0)
        self.metric_weight = check_number("metric_weight", metric_weight, 0.0)
        self.encoder, self.adapts = values.module("encoder", encoder), adapts
        if not self.adapting:
            names = ", ".join(name for name, _ in model.named_parameters())
            raise ValueError(f"adapts picks none of the parameters that require gradients: {names}")

    @property
    def adapting(self) -> list[str]:
        """Names of the base network's parameters that adapt."""
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if self.adapts is not None:
            return [name for name in named if self.adapts(name)]
        transform = {p for layer in self.model.modules() if isinstance(layer, FiLM) for p in layer.parameters()}
        return [name for name, p in named.items() if p not in transform]

    def extra_repr(self) -> str:
        adapts = "" if self.adapts is None else f"adapts={', '.join(self.adapting)!r}, "
        return f"{adapts}inner_lr={self.inner_lr}, metric_weight={self.metric_weight}, {super().extra_repr()}"

    def _inner(self, *targets: Tensor) -> InnerLoop:
        named = dict(self.model.named_parameters())
        return super()._inner(*targets)._replace(lr=rates_like(named, self.adapting, self.inner_lr))

    def _call(self, x: Tensor) -> None:
        conditions = self._embedded(tree_map(lambda leaf: leaf.unsqueeze(0), x))[0]
        args, kwargs = arguments(x, condition=conditions)
        self.model(*args, **kwargs)

    def _adapted(self, inner: InnerLoop, support_x: Tensor, support_y: Tensor) -> dict[str, Tensor]:
        return self._steps(inner, support_x, self._embedded(support_x), support_y)

    def _predicted(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return self._logits(weights, x, self._embedded(x))

    def _whole(self, batch: Sequence[Tensor], weights: Tensor | None) -> MetaOutput:
        support_x, support_y, query_x, query_y = batch
        self._check_classes(support_y, query_y)
        return self._embedded_tasks(batch, self._embedded(support_x, query_x), weights)

    def _masked(self, batch: TaskBatch, weights: Tensor | None) -> MetaOutput:
        support_mask, query_mask = batch.support_mask, batch.query_mask
        self._check_classes(batch.support_y, batch.query_y, support_mask, query_mask)
        conditions = self._embedded(batch.support_x, batch.query_x, mask=both_masks(batch))
        support, query = conditions.split([first(part).shape[1] for part in (batch.support_x, batch.query_x)], 1)
        groups, outputs = groups_of_batch(batch), []
        for tasks, (rows, queries) in groups:
            own = dense(support, support_mask, tasks, rows), dense(query, query_mask, tasks, queries)
            part, of_group = dense_batch(batch, tasks, (rows, queries)), None if weights is None else weights[tasks]
            outputs.append(self._embedded_tasks(part, cat(own, 1), of_group))
        return joined(outputs, groups, query_mask)

    def _embedded_tasks(self, batch: Sequence[Tensor], conditions: Tensor, weights: Tensor | None) -> MetaOutput:
        """`forward` of tasks without padding, whose conditions `[T, S + Q, D]` are known."""
        if self._in_chunks(batch, weights):
            return self._in_parts(self.task_chunk, batch, conditions, weights)
        support_x, support_y, _, query_y = batch
        rows = _beside(support_x, conditions[:, : first(support_x).shape[1]])
        if self._in_turn(module_engine(self.model, self._inner(support_y, query_y), rows, support_y), *batch, weights):
            return self._in_parts(1, batch, conditions, weights)
        return self._from_conditions(*batch, conditions, weights)

    def _in_parts(
        self, size: int | str, batch: Sequence[Tensor], conditions: Tensor, weights: Tensor | None
    ) -> MetaOutput:
        return self._chunked_loss(self._from_conditions, batch, weights, size, self._trained(), conditions)

    def _from_conditions(
        self,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        conditions: Tensor,
        weights: Tensor | None,
    ) -> MetaOutput:
        """`forward` from the conditions `[T, S + Q, D]` on."""
        support, query = conditions.split([first(support_x).shape[1], first(query_x).shape[1]], 1)
        inner = self._inner(support_y, query_y)
        fast = self._steps(inner, support_x, support, support_y)
        output = judged(inner.loss, self._logits(fast, query_x, query), query_y)
        if self.training and self.metric_weight:
            metric_loss = _prototypical_loss(support, support_y, query, query_y)
            task_loss = output.task_loss + self.metric_weight * metric_loss
            output = over_tasks(task_loss, output.accuracy, output.logits)
        return weighted(output, weights)

    def _raise_misfit(self, error: Exception, examples: dict[str, Tensor], targets: dict | None = None) -> None:
        raise_misfit(error, "encoder", self.encoder, examples)
        rows = {}
        for name, x in examples.items():
            condition, _ = called(self.encoder, x)
            if condition is None:
                return
            rows[name] = _beside(split(x, 1)[0], condition.unsqueeze(0))
        raise_misfit(error, "model", self.model, rows, targets, self.loss)

    def _check_classes(self, support_y: Tensor, query_y: Tensor, *masks: Tensor | None) -> None:
        """What the metric space's loss asks for, while tasks have their places in the batch."""
        if self.training and self.metric_weight and (masks or ordinary_ways(support_y, query_y, None) is None):
            classes_of(support_y, query_y, *masks)

    def _embedded(self, *parts: Tensor, mask: Tensor | None = None) -> Tensor:
        """The conditions `[T, B, D]` of the rows of all parts `[T, B_i, ...]`, one part behind the other; zeros for
        those that `mask` `[T, B]` leaves out."""
        shapes = [[leaf.shape[2:] for _, leaf in named_leaves(part, "x")] for part in parts]
        if shapes[1:] != shapes[:-1]:
            found = " and ".join(str(tuple(first(part).shape)) for part in parts)
            raise ValueError(f"support_x and query_x must agree in example shape, got {found}")
        x = cat(parts, 1, "support_x and query_x")
        return by_rows(self.encoder, "encoder", "embeddings [B, D]", x, mask=mask)

    def _steps(self, inner: InnerLoop, x: Tensor, conditions: Tensor, y: Tensor) -> dict[str, Tensor]:
        """The weights that adapt after the inner loop, `[T, *shape]`."""
        rows = _beside(x, conditions)
        engine, slow = module_engine(self.model, inner, rows, y), dict(self.model.named_parameters())
        fast, steps = {name: slow[name] for name in self.adapting}, Steps(self.inner_lr, PLAIN)
        for _ in range(inner.steps):
            buffers = buffers_per_task(self.model, len(conditions))
            gradients = engine.gradients(self.model, inner, fast, buffers, rows, y)
            fast = steps.take(fast, gradients)
        return fast

    def _logits(self, weights: Mapping[str, Tensor], x: Tensor, conditions: Tensor) -> Tensor:
        rows, inner = _beside(x, conditions), self._inner()
        if not adapted_convolutions(self.model, weights):  # what the tasks share is mapped as without any step
            inner = inner._replace(steps=0)
        return module_engine(self.model, inner, rows).predict(self.model, weights, rows)


def _beside(x: Tensor, conditions: Tensor) -> Any:
    """The base network's inputs."""
    args, kwargs = arguments(x, condition=conditions)
    return kwargs or args


def _prototypical_loss(support: Tensor, support_y: Tensor, query: Tensor, query_y: Tensor) -> Tensor:
    """`[T]`, among the classes that have support rows."""
    ways = ordinary_ways(support_y, query_y, None)
    if ways is not None:
        return functional.prototypical_loss(support, support_y, query, query_y, ways)[0]
    classes = classes_of(support_y, query_y)
    distance = functional.pairwise_distance(query, classes.means(support))
    return cross_entropy(classes.without_absent(-distance), classes.query_y)
