"""What algorithms share in which something adapts to each task by an inner loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from weakref import WeakSet

import torch
from torch import Tensor, nn

from fastmeta import values
from fastmeta._trees import arguments, first, requires_grad, split, tree_map, unbind
from fastmeta.functional import checks

from ..batch import TaskBatch
from ..dispatch.labels import readable
from ..engines import PLAIN, Engine, InnerLoop, Rates, Rule, _graph_size, as_loss, check_one_tensor, choose
from ..engines.layerwise import has_formulas
from ..engines.vmap import VmapEngine
from ..functional.reverse_sweep import ChangedAgain
from ._arguments import check_batch, check_count, check_pair, check_tasks, check_weights
from ._chunks import ChunkedLearner
from ._in_turn import in_turn
from ._lazy import initialise, lazy_layer
from ._misfit import raise_misfit
from ._rows import (
    check_masks,
    dense,
    dense_batch,
    groups_of,
    groups_of_batch,
    joined,
    row_counts,
    with_padding,
    without_padding,
)
from ._sweep import MEMORY, swept
from .fast_weights import FastWeights
from .output import MetaOutput, judged, weighted

_changing: WeakSet[InnerLoopAlgorithm] = WeakSet()  # whose support loss is another when it is called again


class InnerLoopAlgorithm(ChunkedLearner):
    """`adapt`, `predict` and `forward` around an inner loop.

    A subclass says what the loop makes of support sets in `_adapted`, and in `_tasks` what comes of whole tasks.
    """

    rule: Rule = PLAIN  # what the loop's steps are besides a rate times a gradient

    _state_type: type = FastWeights

    def __init__(
        self,
        model: nn.Module,
        *,
        inner_steps: int,
        loss: str | Callable[[Tensor, Tensor], Tensor],
        first_order: bool = False,
        task_chunk: int | str | None = None,
        memory: str = "auto",
        every: int = 1,
    ):
        super().__init__(task_chunk)
        values.module("model", model)
        self.inner_steps = check_count("inner_steps", inner_steps, 0)
        self.memory, self.every = values.choice("memory", memory, MEMORY), check_count("every", every, 1)
        self.model = model
        self._lazy = lazy_layer(model) is not None  # until the first call
        self.first_order = values.flag("first_order", first_order)
        self.loss = as_loss(loss)
        if isinstance(loss, nn.Module):  # what it has of parameters and buffers is the learner's
            self.loss_module = loss

    def adapt(self, support_x: Tensor, support_y: Tensor, support_mask: Tensor | None = None) -> FastWeights:
        """Run the inner loop on support sets `[T, S, ...]` with targets `[T, S]` or `[T, S, O]`. `support_mask` bool
        `[T, S]`: False for rows that are padding, which nothing sees."""
        check_pair("support_x", support_x, "support_y", support_y)
        check_one_tensor(self.loss, "support_y", support_y)
        checks.mask("support_mask", support_mask, first(support_x), "support_x")
        self._initialise(support_x, support_mask)
        try:
            if support_mask is None or len(support_mask) == 0:
                return self._state(support_x, support_y)
            groups = groups_of(row_counts((support_y, support_mask)), support_mask.device)
            states = [
                self._state(*(dense(t, support_mask, tasks, rows) for t in (support_x, support_y)))
                for tasks, (rows,) in groups
            ]
        except Exception as error:
            targets = {"support_y": without_padding(support_y, support_mask)}
            self._raise_misfit(error, {"support_x": support_x}, targets)
            raise
        return type(states[0]).joined(states, groups)

    def predict(self, state: FastWeights, query_x: Tensor, query_mask: Tensor | None = None) -> Tensor:
        """Predictions `[T, Q, C]` of the adapted weights for `query_x` `[T, Q, ...]`; zeros in rows where `query_mask`
        bool `[T, Q]` is False."""
        if not isinstance(state, self._state_type):
            raise TypeError(
                f"state must be what adapt returns, {self._state_type.__name__}, got {type(state).__name__}"
            )
        check_tasks(query_x, self._num_tasks(state))
        checks.mask("query_mask", query_mask, first(query_x), "query_x")
        try:
            if query_mask is None or len(query_mask) == 0:
                return self._predictions(state, query_x)
            groups = groups_of(row_counts((query_x, query_mask)), query_mask.device)
            parts = [
                self._predictions(state.of_tasks(tasks), dense(query_x, query_mask, tasks, rows))
                for tasks, (rows,) in groups
            ]
        except Exception as error:
            self._raise_misfit(error, {"query_x": query_x})
            raise
        return with_padding(parts, groups, query_mask)

    def _num_tasks(self, state: FastWeights) -> int:
        return state.num_tasks  # a number of torch.export where it is of any size

    def _state(self, support_x: Tensor, support_y: Tensor) -> FastWeights:
        """`adapt` of tasks without padding."""
        slow = dict(self.model.named_parameters())
        weights = slow | self._adapted(self._inner(support_y), support_x, support_y)
        shared = frozenset(name for name, w in weights.items() if w.dim() == slow[name].dim())
        return FastWeights(weights, shared, first(support_x).shape[0])

    def _predictions(self, state: FastWeights, query_x: Tensor) -> Tensor:
        """`predict` without padding."""
        return self._predicted(state.weights, query_x)

    def forward(self, batch: TaskBatch, weights: Tensor | None = None) -> MetaOutput:
        """Adapt to every task's support set and judge on its query set. With `weights` `[T]` each task's loss counts
        that often in `loss`, which stays a mean over `T`; they may require gradients.

        Rows that the batch's masks leave out are not looked at: tasks with the same numbers of rows run together, group
        after group, so that each task gets what it would get alone.
        """
        batch = TaskBatch.of(batch)
        masked = self._check_batch(batch)
        check_weights(weights, batch)
        try:
            return self._masked(batch, weights) if masked else self._whole(batch[:4], weights)
        except Exception as error:
            self._raise_misfit_of_batch(error, batch)
            raise

    def _masked(self, batch: TaskBatch, weights: Tensor | None) -> MetaOutput:
        """`forward` of tasks with padding."""
        groups = groups_of_batch(batch)
        outputs = [
            self._whole(dense_batch(batch, tasks, sizes), None if weights is None else weights[tasks])
            for tasks, sizes in groups
        ]
        return joined(outputs, groups, batch.query_mask)

    def _whole(self, batch: Sequence[Tensor], weights: Tensor | None) -> MetaOutput:
        """`forward` of tasks without padding."""
        if self._in_chunks(batch, weights):
            return self._chunked(self.task_chunk, batch, weights)
        return self._tasks(*batch, weights)

    def _raise_misfit(self, error: Exception, examples: dict[str, Tensor], targets: dict | None = None) -> None:
        """Raise what says better than `error` that the model does not take these examples, if that is so."""
        raise_misfit(error, "model", self.model, examples, targets, self.loss)

    def _raise_misfit_of_batch(self, error: Exception, batch: TaskBatch) -> None:
        examples = {"support_x": batch.support_x, "query_x": batch.query_x}
        targets = {
            "support_y": without_padding(batch.support_y, batch.support_mask),
            "query_y": without_padding(batch.query_y, batch.query_mask),
        }
        self._raise_misfit(error, examples, targets)

    def extra_repr(self) -> str:
        return (
            f"inner_steps={self.inner_steps}, first_order={self.first_order}, loss={self.loss.name!r}, "
            f"task_chunk={self.task_chunk!r}"
            + (f", memory={self.memory!r}, every={self.every}" if self.memory != "auto" else "")
            + (f", {self.rule}" if self.rule != PLAIN else "")
        )

    def _check_batch(self, batch: TaskBatch) -> bool:
        """Whether the batch has masks, after all checks."""
        check_batch(batch)
        check_one_tensor(self.loss, "support_y", batch[1])
        check_one_tensor(self.loss, "query_y", batch[3])
        masked = check_masks(batch)
        self._initialise(batch[0], batch.support_mask if masked else None)
        return masked

    def _initialise(self, support_x: Tensor, mask: Tensor | None) -> None:
        """Lazy layers take their shapes from the first task's rows, as in a call of the model with them."""
        if self._lazy and len(first(support_x)):
            x = unbind(split(support_x, 1)[0])[0]
            rows = x if mask is None else tree_map(lambda leaf: leaf[mask[0]], x)
            initialise(self, lambda: self._call(rows))
            self._lazy = False

    def _call(self, x: Tensor) -> None:
        """The model on one task's rows."""
        args, kwargs = arguments(x)
        self.model(*args, **kwargs)

    def _adapted(self, inner: InnerLoop, support_x: Tensor, support_y: Tensor) -> dict[str, Tensor]:
        """Weights by name after the loop, `[T, *shape]`, or `[*shape]` if the tasks share them, as they do the rest."""
        raise NotImplementedError

    def _tasks(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor, weights: Tensor | None
    ) -> MetaOutput:
        """`forward` of one chunk."""
        raise NotImplementedError

    def _predicted(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        inner = self._inner()
        if not adapted_convolutions(self.model, weights):  # what the tasks share is mapped as without any step
            inner = inner._replace(steps=0)
        return self._engine(inner, x).predict(self.model, weights, x)

    def _engine(self, inner: InnerLoop, x: Tensor) -> Engine:
        return choose("auto", self.model, inner, x)

    def _inner(self, *targets: Tensor, lr: float | Rates = 0.0) -> InnerLoop:
        """`targets`: of the support rows, then of the query rows."""
        differentiable = torch.is_grad_enabled() and any(map(requires_grad, targets))
        queries = first(targets[1]).shape[1] if len(targets) > 1 else 0
        loss = self.loss.for_targets(*targets)
        # what hands its weights out, or takes no step, has nothing to sweep
        sweep = self.memory == "sweep" and self.inner_steps > 0 and len(targets) > 1 and torch.is_grad_enabled()
        sweep = sweep and len(first(targets[0])) > 0
        return InnerLoop(lr, self.inner_steps, self.first_order, loss, differentiable, queries, self.rule, sweep)

    def _trained_by_loss(self) -> list[Tensor]:
        """The parameters of a loss that has some, and tensors that it holds on to and that require gradients."""
        module = getattr(self, "loss_module", None)
        own = [] if module is None else [p for p in module.parameters() if p.requires_grad]
        known = {id(p) for p in (*own, *self.model.parameters())}
        return own + [tensor for tensor in self.loss.captured() if id(tensor) not in known]

    def _trained(self) -> list[Tensor]:
        """All that a meta-gradient reaches but for the batch."""
        own = [p for p in self.parameters() if p.requires_grad]
        known = {id(p) for p in own}
        return own + [tensor for tensor in self._trained_by_loss() if id(tensor) not in known]

    def _queried(
        self, engine: Engine, model: nn.Module, inner: InnerLoop, batch: tuple, weights: Tensor | None
    ) -> MetaOutput:
        """What comes of tasks whose steps are taken one by one."""
        sweep = inner.sweep or self._sweeps_of_itself(engine, model, inner, batch, weights)
        if self._in_turn(engine, *batch, weights):
            if not sweep:
                return in_turn(engine, model, inner, batch, weights, self._trained())
            if model is self.model:
                return self._chunked(1, batch, weights)

        def with_graph() -> MetaOutput:
            support_x, support_y, query_x, query_y = batch
            logits = engine.query(model, inner, support_x, support_y, query_x)
            return weighted(judged(inner.loss, logits, query_y), weights)

        if not (sweep and isinstance(engine, VmapEngine)) or _by_formulas(engine, model, inner, batch[0]):
            return with_graph()
        options = {"every": self.every, "of_loss": self._trained_by_loss()}
        if inner.sweep:
            return swept(engine, model, inner, batch, weights, **options)
        try:
            return swept(engine, model, inner, batch, weights, **options, again=with_graph)
        except ChangedAgain:
            _changing.add(self)
            return with_graph()

    def _sweeps_of_itself(
        self, engine: Engine, model: nn.Module, inner: InnerLoop, batch: Sequence[Tensor], weights: Tensor | None
    ) -> bool:
        """Whether memory="auto" sweeps: where a graph over the steps would be large, and gradients go nowhere but to
        what is trained."""
        if self.memory != "auto" or inner.sweep or inner.first_order or inner.steps < 2:  # a graph of one step, at most
            return False
        if inner.rule.adam is not None:  # the sweep goes back through steps of SGD
            return False
        if not isinstance(engine, VmapEngine) or not torch.is_grad_enabled() or self in _changing:
            return False
        support_x, tasks = first(batch[0]), 1 if engine.name == "loop" else len(first(batch[0]))
        if not support_x.numel() or not readable(first(batch[1])) or torch._C._are_functorch_transforms_active():
            return False
        if any(part is not None and requires_grad(part) for part in (*batch, weights)) or not self._trained():
            return False
        if _by_formulas(engine, model, inner, batch[0]):
            return False
        if engine.name == "loop" and len(support_x) > 1 and model is not self.model:  # not in turn, if swept
            return False
        return _graph_size.is_large(model, inner, split(batch[0], tasks)[0], split(batch[2], tasks)[0])

    def _chunked(self, size: int | str, batch: Sequence[Tensor], weights: Tensor | None) -> MetaOutput:
        return self._chunked_loss(self._tasks, batch, weights, size, self._trained())

    def _in_turn(self, engine: Engine, *tensors: Tensor | None) -> bool:
        """Whether each task's part of the meta-gradient is taken as soon as it is run, with the memory of one task: in
        plain autograd, which has to hold a graph for each, and where `tensors` want no gradients through `backward`."""
        if engine.name != "loop" or len(first(tensors[0])) < 2 or not torch.is_grad_enabled():
            return False
        wanted = any(t is not None and requires_grad(t) for t in tensors)
        return not (wanted or torch._C._are_functorch_transforms_active())


def _by_formulas(engine: Engine, model: nn.Module, inner: InnerLoop, x: Tensor) -> bool:
    """Whether the engine keeps no graph anyway, in formulas of first order."""
    return engine.name == "layerwise" and has_formulas(model, inner, x)


def adapted_convolutions(model: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Whether a convolution has weights of each task's own."""
    layers = [(f"{name}.weight", m) for name, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)]
    return any(name in weights and weights[name].dim() > layer.weight.dim() for name, layer in layers)


def detached_weights(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The slow weights by name without a graph: all of them, and those that adapt and are trained."""
    slow = {name: p.detach() for name, p in model.named_parameters()}
    return slow, {name: slow[name] for name, p in model.named_parameters() if p.requires_grad}
