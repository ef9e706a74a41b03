"""CAML as conditional modulation: a network adapts to each task by an inner loop, and a metric space of the classes
shifts and scales its features all the while.

Two papers bear the name CAML. This is the one of 2019; that of 2024 is in `caml_incontext`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastmeta import functional

from ..engines import InnerLoop, module_engine
from ..engines.vmap import buffers_per_task
from ._arguments import check_number
from ._chunks import chunked_loss
from ._embedding import by_rows
from ._inner_loop import InnerLoopAlgorithm, adapted_convolutions
from .film import FiLM
from .output import MetaOutput, judged, over_tasks, weighted


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
            with `outputs` for images, `FiLMMLP` for vectors, or your own. Batch norms see one task's rows, support and
            query apart, as in `MAML`: build it with `track_running_stats=False`. Parameters with `requires_grad=False`
            are neither adapted nor trained.
        adapts: which of the base network's parameters adapt, a callable from a name to a bool. None (default): all but
            those of its `FiLM` layers.
        inner_lr: step size in the inner loop, 0.1 by default.
        inner_steps: `K >= 0`, 5 by default. May be set anew between calls.
        metric_weight: what the loss of a prototypical network on the embeddings counts beside the query loss, in train
            mode alone; 0 by default. With more, targets are labels int64 in `[0, C)`, and a class without support rows
            has its mean at zero.
        first_order: drop the second derivatives.
        loss: `"cross_entropy"`, `"mse"`, `"binary_cross_entropy"` (of logits), `"huber"`, or a callable
            `(prediction, target) -> scalar` for one task.
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
        task_chunk: int | None = None,
    ):
        super().__init__(model, inner_steps=inner_steps, first_order=first_order, loss=loss, task_chunk=task_chunk)
        if not (adapts is None or callable(adapts)):
            raise TypeError(f"adapts must be None or a callable(name) -> bool, got {adapts!r}")
        self.inner_lr = check_number("inner_lr", inner_lr)
        self.metric_weight = check_number("metric_weight", metric_weight, 0.0)
        self.encoder, self.adapts = encoder, adapts
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

    def _adapted(self, inner: InnerLoop, support_x: Tensor, support_y: Tensor) -> dict[str, Tensor]:
        return self._steps(inner, support_x, self._embedded(support_x), support_y)

    def _predicted(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return self._logits(weights, x, self._embedded(x))

    def _tasks(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor, weights: Tensor | None
    ) -> MetaOutput:
        batch = support_x, support_y, query_x, query_y
        conditions = self._embedded(support_x, query_x)
        net, rows = self._conditioned(support_x, conditions[:, : support_x.shape[1]])
        if self._in_turn(module_engine(net, self._inner(), rows, support_y), *batch, weights):
            return self._in_parts(1, batch, conditions, weights)
        return self._from_conditions(*batch, conditions, weights)

    def _chunked(self, size: int, batch, weights: Tensor | None) -> MetaOutput:
        support_x, _, query_x, _ = batch
        return self._in_parts(size, batch, self._embedded(support_x, query_x), weights)

    def _in_parts(self, size: int, batch, conditions: Tensor, weights: Tensor | None) -> MetaOutput:
        parameters = [p for p in self.parameters() if p.requires_grad]
        return chunked_loss(self._from_conditions, batch, weights, size, parameters, conditions)

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
        support, query = conditions.split([support_x.shape[1], query_x.shape[1]], 1)
        fast = self._steps(self._inner(support_y, query_y), support_x, support, support_y)
        output = judged(self.loss, self._logits(fast, query_x, query), query_y)
        if self.training and self.metric_weight:
            classes = output.logits.shape[-1]
            metric_loss, _ = functional.prototypical_loss(support, support_y, query, query_y, classes)
            task_loss = output.task_loss + self.metric_weight * metric_loss
            output = over_tasks(task_loss, output.accuracy, output.logits)
        return weighted(output, weights)

    def _embedded(self, *parts: Tensor) -> Tensor:
        """The conditions `[T, B, D]` of the rows of all parts `[T, B_i, ...]`, one part behind the other."""
        if len({part.shape[2:] for part in parts}) > 1:
            shapes = " and ".join(str(tuple(part.shape)) for part in parts)
            raise ValueError(f"support_x and query_x must agree in example shape, got {shapes}")
        return by_rows(self.encoder, "encoder", "embeddings [B, D]", torch.cat(parts, 1))

    def _steps(self, inner: InnerLoop, x: Tensor, conditions: Tensor, y: Tensor) -> dict[str, Tensor]:
        """The weights that adapt after the inner loop, `[T, *shape]`."""
        net, rows = self._conditioned(x, conditions)
        engine, slow, names = module_engine(net, inner, rows, y), dict(net.named_parameters()), self.adapting
        fast = {net.name_of(name): slow[net.name_of(name)] for name in names}
        for _ in range(inner.steps):
            gradients = engine.gradients(net, inner, fast, buffers_per_task(net, len(rows)), rows, y)
            fast = functional.fast_weight_update(fast, gradients, self.inner_lr)
        return dict(zip(names, fast.values(), strict=True))

    def _logits(self, weights: Mapping[str, Tensor], x: Tensor, conditions: Tensor) -> Tensor:
        net, rows = self._conditioned(x, conditions)
        inner = self._inner()
        if not adapted_convolutions(self.model, weights):  # what the tasks share is mapped as without any step
            inner = inner._replace(steps=0)
        engine = module_engine(net, inner, rows)
        return engine.predict(net, {net.name_of(name): w for name, w in weights.items()}, rows)

    def _conditioned(self, x: Tensor, conditions: Tensor) -> tuple[_Conditioned, Tensor]:
        """The base network as engines see one, and its rows."""
        known = _conditioned.setdefault(self, {})
        key = (x.shape[2:], conditions.shape[2], (x.dtype, conditions.dtype))
        if key not in known or known[key].model is not self.model:  # kept, so that it is tried once
            if len(known) >= _MOST:
                known.clear()
            known[key] = _Conditioned(self.model, *key)
        net = known[key]
        net.training = self.model.training  # its layers keep their own modes
        examples = x.reshape(*x.shape[:2], x.shape[2:].numel())
        holds_both = x.dtype if x.dtype == conditions.dtype else torch.float64  # tokens too, exactly
        return net, torch.cat([examples.to(holds_both), conditions.to(holds_both)], 2)


class _Conditioned(nn.Module):
    """The base network of one input: a row holds an example and, behind it, its condition."""

    def __init__(self, model: nn.Module, shape: torch.Size, width: int, dtypes: tuple[torch.dtype, torch.dtype]):
        super().__init__()
        self.model, self.shape, self.width, self.dtypes = model, shape, width, dtypes

    def forward(self, rows: Tensor) -> Tensor:
        x = rows[:, : -self.width].reshape(len(rows), *self.shape)
        condition = rows[:, -self.width :]
        return self.model(x.to(self.dtypes[0]), condition.to(self.dtypes[1]))

    def name_of(self, name: str) -> str:
        """The name here of a parameter of the model's."""
        return f"model.{name}"


_MOST = 16  # sizes of examples may vary without end
_conditioned: WeakKeyDictionary[ConditionalCAML, dict[tuple, _Conditioned]] = WeakKeyDictionary()
