"""CAVIA: only a small context vector adapts to a task; all weights are shared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastmeta import values
from fastmeta._trees import Outputs, arguments, first, flatten, unflatten

from ..engines import loss_of_task, module_engine
from ..engines.inspect import mlp_spec
from ..engines.layer_formulas import forward, layers, why_no_formulas
from ..engines.vmap import VmapEngine, buffers_per_task
from ._arguments import check_count, check_number
from ._gradients import layer_gradients
from ._inner_loop import InnerLoopAlgorithm
from ._inner_lr import real_dtype
from ._misfit import raise_misfit
from ._rows import Group, in_order
from .output import MetaOutput, judged, weighted


class Context(NamedTuple):
    """What `CAVIA.adapt` returns: every task's context parameters, `[T, P]`."""

    context: Tensor

    def of_tasks(self, tasks: Tensor) -> Context:
        """Those of some tasks, int64 `[t]`, in that order."""
        return Context(self.context[tasks])

    @classmethod
    def joined(cls, parts: Sequence[Context], groups: Sequence[Group]) -> Context:
        """Those of all tasks, from those of groups of them."""
        return cls(in_order([part.context for part in parts], groups))


class CAVIA(InnerLoopAlgorithm):
    """CAVIA (Zintgraf, Shiarlis, Kurin, Hofmann, Whiteson 2019, "Fast Context Adaptation via Meta-Learning", section 3,
    algorithm 1).

    Every task has context parameters `phi`, which start at zero and take `inner_steps` steps
    `phi <- phi - inner_lr * grad_phi L_support(phi, theta)`; the weights `theta` are shared by all tasks and trained on
    the query loss at the adapted `phi`, second derivatives included. So no task has weights of its own, and every
    product is one over the rows of all tasks. Departures: none in the rule; the authors' code for regression also
    clamps each task's gradient to [-10, 10], which is left to the outer loop here.

    Args:
        model: with `concatenate`, a module from rows `[B, I + P]` to predictions `[B, C]`: the task's context stands
            behind each input. Without, one that is called with the examples `[B, ...]` of a task and its context
            `[P]`, such as `ContextFiLMConv4`, and may use it where it likes: the last positional argument, or where
            the inputs are a dict the keyword argument `context`. Batch norms see one task's rows, as in `MAML`.
        context_size: `P`, the number of context parameters; the paper has 2 to 5 for sinusoids, 100 for images.
        concatenate: whether the context joins the input; True by default.
        inner_lr: step size of the context, 1.0 by default, as in the paper.
        inner_steps: `K >= 0`, 1 by default; the paper has 1 for regression, 2 for images. May be set anew between
            calls.
        first_order: drop the second derivatives.
        loss: as in `MAML`.
        task_chunk: at most this many tasks at a time, to bound memory; as in `MAML`.

    Multi-layer perceptrons run as batched formulas, other modules under `torch.func`.

    Raises:
        TypeError, ValueError: arguments out of range; inputs and targets that do not fit together, inputs that are no
            rows where the context is to join them.
    """

    _state_type = Context

    def __init__(
        self,
        model: nn.Module,
        context_size: int,
        *,
        concatenate: bool = True,
        inner_lr: float = 1.0,
        inner_steps: int = 1,
        first_order: bool = False,
        loss: str | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
        task_chunk: int | str | None = None,
    ):
        super().__init__(model, inner_steps=inner_steps, loss=loss, first_order=first_order, task_chunk=task_chunk)
        self.context_size = check_count("context_size", context_size, 1)
        self.inner_lr = check_number("inner_lr", inner_lr, 0)
        self.concatenate = values.flag("concatenate", concatenate)

    def adapt(self, support_x: Tensor, support_y: Tensor, support_mask: Tensor | None = None) -> Context:
        """Context parameters of support sets `[T, S, ...]` with targets `[T, S]` or `[T, S, O]`. `support_mask` bool
        `[T, S]`: False for rows that are padding, which nothing sees."""
        return super().adapt(support_x, support_y, support_mask)

    def _state(self, support_x: Tensor, support_y: Tensor) -> Context:
        gradient = self._context_gradient(support_x, support_y)
        rows = first(support_x)
        like = next(self.model.parameters(), rows)
        context = like.new_zeros(len(rows), self.context_size, dtype=real_dtype(like))
        second_order = torch.is_grad_enabled() and not self.first_order
        for _ in range(self.inner_steps):
            with torch.set_grad_enabled(second_order):
                step = gradient(context)
            context = context - self.inner_lr * step
        return Context(context)

    def _num_tasks(self, state: Context) -> int:
        return len(state.context)

    def _raise_misfit(self, error: Exception, examples: dict[str, Tensor], targets: dict | None = None) -> None:
        like = next(iter(examples.values()))
        model = _WithContext(self.model, self.context_size, self.concatenate).like(like)
        raise_misfit(error, "model", model, examples, targets, self.loss)

    def _predictions(self, state: Context, query_x: Tensor) -> Tensor:
        if self._is_mlp(query_x):
            spec = mlp_spec(self.model)
            weights, biases = layers(spec, dict(self.model.named_parameters()))
            return forward(spec, weights, biases, self._joined(query_x, state.context))[2]
        weights, buffers = dict(self.model.named_parameters()), buffers_per_task(self.model, len(state.context))
        engine = self._module_engine(query_x)
        rows, inputs = flatten(query_x)
        outputs = Outputs()

        def one_task(context, weights, buffers, rows):
            return outputs.taken(self._task(engine, context, weights, buffers, unflatten(inputs, rows)))

        run = engine.mapped(one_task, (0, None, 0, 0))
        return outputs.put_back(run(state.context, weights, buffers, rows))

    def extra_repr(self) -> str:
        return (
            f"context_size={self.context_size}, concatenate={self.concatenate}, inner_lr={self.inner_lr}, "
            f"{super().extra_repr()}"
        )

    def _tasks(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor, weights: Tensor | None
    ) -> MetaOutput:
        if not self._is_mlp(support_x):
            engine = self._module_engine(support_x, support_y)
            batch = support_x, support_y, query_x, query_y
            if self._in_turn(engine, *batch, weights):
                return self._chunked(1, batch, weights)
        loss = self._inner(support_y, query_y).loss
        output = judged(loss, self._predictions(self._state(support_x, support_y), query_x), query_y)
        return weighted(output, weights)

    def _joined(self, x: Tensor, context: Tensor) -> Tensor:
        """Rows `[T, B, I]` with their task's context behind each, `[T, B, I + P]`."""
        return torch.cat([x, context.unsqueeze(1).expand(-1, x.shape[1], -1)], -1)

    def _is_mlp(self, x: Tensor) -> bool:
        if not self.concatenate:
            return False
        if not isinstance(x, Tensor):
            raise ValueError(
                "the context joins rows [T, B, I] of one tensor, got inputs of several: give a model that takes the "
                "context behind them and concatenate=False"
            )
        if x.dim() != 3:
            raise ValueError(
                f"the context joins rows [T, B, I], got inputs of shape {list(x.shape)}: flatten them, or give a model "
                "that takes the context and concatenate=False"
            )
        spec, width = mlp_spec(self.model), x.shape[2] + self.context_size
        if isinstance(spec, str):
            return False
        if width != spec.in_features:
            raise ValueError(
                f"the model takes {spec.in_features} features, but an input has {x.shape[2]} and its context "
                f"{self.context_size}"
            )
        joined = x.new_empty(()).expand(*x.shape[:2], width)
        return why_no_formulas(self.model, joined) is None

    def _context_gradient(self, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        """The function from contexts `[T, P]` to the gradient of each task's support loss `[T, P]`."""
        loss = self._inner(y).loss
        if self._is_mlp(x):
            spec = mlp_spec(self.model)
            weights, biases = layers(spec, dict(self.model.named_parameters()))

            def formula(context: Tensor) -> Tensor:
                _, deltas = layer_gradients(spec, loss, weights, biases, self._joined(x, context), y)
                return deltas[0].sum(1) @ weights[0][:, x.shape[2] :]

            return formula

        (rows, inputs), (labels, targets) = flatten(x), flatten(y)

        def task_loss(context, weights, buffers, rows, labels):
            prediction = self._task(engine, context, weights, buffers, unflatten(inputs, rows))
            return loss_of_task(loss, prediction, unflatten(targets, labels), "support_y")

        weights, engine = dict(self.model.named_parameters()), self._module_engine(x, y)

        def transformed(context: Tensor) -> Tensor:
            buffers = buffers_per_task(self.model, len(context))
            second_order = torch.is_grad_enabled()
            gradient = engine.gradients_per_task(task_loss, (0, None, 0, 0, 0), second_order=second_order)
            return gradient(context, weights, buffers, rows, labels)

        return transformed

    def _module_engine(self, x: Tensor, y: Tensor | None = None) -> VmapEngine:
        if self not in _with_contexts:
            _with_contexts[self] = _WithContext(self.model, self.context_size, self.concatenate)
        model = _with_contexts[self].like(x)
        adapting = {"context": model.context.new_full((1,), self.inner_lr)}
        inner = self._inner(*(() if y is None else (y,)))._replace(lr=adapting, steps=1)
        return module_engine(model, inner, x, y)

    def _call(self, x: Tensor) -> None:
        like = next((p for p in self.model.parameters() if not is_lazy(p)), first(x))
        context = like.new_zeros(self.context_size, dtype=real_dtype(like))
        args, kwargs = _arguments(x, context, self.concatenate)
        self.model(*args, **kwargs)

    def _task(self, engine: VmapEngine, context: Tensor, weights: dict, buffers: dict, x: Tensor) -> Tensor:
        """One task's predictions `[B, C]`."""
        return engine.call(self.model, {**weights, **buffers}, *_arguments(x, context, self.concatenate))


class _WithContext(nn.Module):
    """The model as an engine sees one: the context is a parameter of it."""

    def __init__(self, model: nn.Module, context_size: int, concatenate: bool):
        super().__init__()
        self.model, self.concatenate = model, concatenate
        self.context = nn.Parameter(torch.zeros(context_size))

    def like(self, x: Tensor) -> _WithContext:
        parameter = next(self.model.parameters(), first(x))
        self.context.data = self.context.data.to(parameter.device, real_dtype(parameter))
        self.training = self.model.training  # its layers keep their own modes
        return self

    def forward(self, *args, **kwargs) -> Tensor:
        x = kwargs or (args[0] if len(args) == 1 else args)
        args, kwargs = _arguments(x, self.context, self.concatenate)
        return self.model(*args, **kwargs)


_with_contexts: WeakKeyDictionary[CAVIA, _WithContext] = WeakKeyDictionary()


def _arguments(x: Tensor, context: Tensor, concatenate: bool) -> tuple[tuple, dict[str, Any]]:
    """How the model is called with one task's rows and context."""
    if concatenate:
        return (torch.cat([x, context.expand(x.shape[0], -1)], -1),), {}
    return arguments(x, context=context)
