"""What algorithms share in which something adapts to each task by an inner loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fastmeta import values
from fastmeta._trees import arguments, first, requires_grad, split, unbind

from ..batch import TaskBatch
from ..engines import PLAIN, Engine, InnerLoop, Rates, Rule, as_loss, check_one_tensor, choose
from ._arguments import check_batch, check_count, check_pair, check_size, check_tasks, check_weights
from ._chunks import chunked_loss
from ._lazy import initialise, lazy_layer
from ._misfit import raise_misfit
from .fast_weights import FastWeights
from .output import MetaOutput


class InnerLoopAlgorithm(nn.Module):
    """`adapt`, `predict` and `forward` around an inner loop.

    A subclass says what the loop makes of support sets in `_adapted`, and in `_tasks` what comes of whole tasks.
    """

    rule: Rule = PLAIN  # what the loop's steps are besides a rate times a gradient

    def __init__(
        self,
        model: nn.Module,
        *,
        inner_steps: int,
        loss: str | Callable[[Tensor, Tensor], Tensor],
        first_order: bool = False,
        task_chunk: int | None = None,
    ):
        super().__init__()
        values.module("model", model)
        self.inner_steps = check_count("inner_steps", inner_steps, 0)
        self.task_chunk = check_size("task_chunk", task_chunk, or_none=True)
        self.model = model
        self._lazy = lazy_layer(model) is not None  # until the first call
        self.first_order = values.flag("first_order", first_order)
        self.loss = as_loss(loss)
        if isinstance(loss, nn.Module):  # what it has of parameters and buffers is the learner's
            self.loss_module = loss

    def adapt(self, support_x: Tensor, support_y: Tensor) -> FastWeights:
        """Run the inner loop on support sets `[T, S, ...]` with targets `[T, S]` or `[T, S, O]`."""
        self._check_pair(support_x, support_y)
        slow = dict(self.model.named_parameters())
        try:
            weights = slow | self._adapted(self._inner(support_y), support_x, support_y)
        except Exception as error:
            self._raise_misfit(error, {"support_x": support_x}, {"support_y": support_y})
            raise
        shared = frozenset(name for name, w in weights.items() if w.dim() == slow[name].dim())
        return FastWeights(weights, shared, len(first(support_x)))

    def predict(self, state: FastWeights, query_x: Tensor) -> Tensor:
        """Predictions `[T, Q, C]` of the adapted weights for `query_x` `[T, Q, ...]`."""
        if not isinstance(state, FastWeights):
            raise TypeError(f"state must be what adapt returns, FastWeights, got {type(state).__name__}")
        check_tasks(query_x, len(state))
        try:
            return self._predicted(state.weights, query_x)
        except Exception as error:
            self._raise_misfit(error, {"query_x": query_x})
            raise

    def forward(self, batch: TaskBatch, weights: Tensor | None = None) -> MetaOutput:
        """Adapt to every task's support set and judge on its query set. With `weights` `[T]` each task's loss counts
        that often in `loss`, which stays a mean over `T`; they may require gradients."""
        batch = TaskBatch.of(batch)
        self._check_batch(batch)
        check_weights(weights, batch)
        try:
            if self._in_chunks(batch):
                return self._chunked(self.task_chunk, batch, weights)
            return self._tasks(*batch, weights)
        except Exception as error:
            self._raise_misfit_of_batch(error, batch)
            raise

    def _raise_misfit(self, error: Exception, examples: dict[str, Tensor], targets: dict | None = None) -> None:
        """Raise what says better than `error` that the model does not take these examples, if that is so."""
        raise_misfit(error, "model", self.model, examples, targets, self.loss)

    def _raise_misfit_of_batch(self, error: Exception, batch: TaskBatch) -> None:
        support_x, support_y, query_x, query_y = batch[:4]
        examples = {"support_x": support_x, "query_x": query_x}
        self._raise_misfit(error, examples, {"support_y": support_y, "query_y": query_y})

    def extra_repr(self) -> str:
        return (
            f"inner_steps={self.inner_steps}, first_order={self.first_order}, loss={self.loss.name!r}, "
            f"task_chunk={self.task_chunk}" + (f", {self.rule}" if self.rule != PLAIN else "")
        )

    def _check_pair(self, support_x: Tensor, support_y: Tensor) -> None:
        check_pair("support_x", support_x, "support_y", support_y)
        check_one_tensor(self.loss, "support_y", support_y)
        if self._lazy:
            self._initialise(support_x)

    def _check_batch(self, batch: TaskBatch) -> None:
        check_batch(batch)
        check_one_tensor(self.loss, "support_y", batch[1])
        check_one_tensor(self.loss, "query_y", batch[3])
        if self._lazy:
            self._initialise(batch[0])

    def _initialise(self, support_x: Tensor) -> None:
        """Lazy layers take their shapes from the first task's rows, as in a call of the model with them."""
        if len(first(support_x)):
            initialise(self, lambda: self._call(unbind(split(support_x, 1)[0])[0]))
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
        return InnerLoop(lr, self.inner_steps, self.first_order, loss, differentiable, queries, self.rule)

    def _trained_by_loss(self) -> list[nn.Parameter]:
        """The parameters of a loss that has some."""
        module = getattr(self, "loss_module", None)
        return [] if module is None else [p for p in module.parameters() if p.requires_grad]

    def _chunked(self, size: int, batch: TaskBatch | tuple, weights: Tensor | None) -> MetaOutput:
        return chunked_loss(self._tasks, batch, weights, size, [p for p in self.parameters() if p.requires_grad])

    def _in_turn(self, engine: Engine, *tensors: Tensor | None) -> bool:
        """Whether each task's part of the meta-gradient is taken as soon as it is run, with the memory of one task: in
        plain autograd, which has to hold a graph for each, and where `tensors` want no gradients through `backward`."""
        if engine.name != "loop" or len(first(tensors[0])) < 2 or not torch.is_grad_enabled():
            return False
        wanted = any(t is not None and requires_grad(t) for t in tensors)
        return not (wanted or torch._C._are_functorch_transforms_active())

    def _in_chunks(self, batch: TaskBatch) -> bool:
        return self.task_chunk is not None and len(first(batch[0])) > self.task_chunk


def adapted_convolutions(model: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Whether a convolution has weights of each task's own."""
    layers = [(f"{name}.weight", m) for name, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)]
    return any(name in weights and weights[name].dim() > layer.weight.dim() for name, layer in layers)


def detached_weights(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The slow weights by name without a graph: all of them, and those that adapt and are trained."""
    slow = {name: p.detach() for name, p in model.named_parameters()}
    return slow, {name: slow[name] for name, p in model.named_parameters() if p.requires_grad}
