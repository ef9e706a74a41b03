"""The engine for whatever plain PyTorch can differentiate: autograd itself, one task after the other.

What it gives is the definition of right for every other engine. The module runs as it is: its hooks see ordinary
tensors of one task; checkpointed blocks, `autograd.Function`s of a user's own and masks that depend on the data are all
allowed. Buffers are as in the vmap engine: each task has its own copy, and what `forward` writes into it is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from fastmeta._trees import Outputs, arguments, first, unbind

from ..functional.run_again import call_again
from ..functional.second_order import differentiate, twice_differentiable
from ._base import InnerLoop, Parameters, is_shared
from ._exact import dense_gradients, outside_inference_mode
from ._losses import loss_of_task
from ._steps import Steps
from .vmap import VmapEngine, check_statistics


class LoopEngine(VmapEngine):
    """Plain autograd, one task after the other: whatever PyTorch can differentiate."""

    name = "loop"

    def call(self, model: nn.Module, weights: Parameters, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        sparse = any(getattr(layer, "sparse", False) for layer in model.modules())
        with dense_gradients() if sparse else nullcontext():
            return call_again(model, weights, args, kwargs)

    def adapt(self, model: nn.Module, inner: InnerLoop, support_x: Tensor, support_y: Tensor) -> dict[str, Tensor]:
        if not inner.steps or not len(first(support_x)):
            return super().adapt(model, inner, support_x, support_y)
        check_statistics(model)
        names, slow = self.moving(model, inner, support_x, support_y), dict(model.named_parameters())
        tasks = zip(unbind(support_x), unbind(support_y), strict=True)
        return slow | _stacked([self._adapted(model, inner, slow, names, x, y) for x, y in tasks])

    def in_turn(
        self, model: nn.Module, inner: InnerLoop, support_x: Tensor, support_y: Tensor, query_x: Tensor
    ) -> Iterator[Any]:
        """`query` of one task after the other, `[Q, C]` each, of which no more than the last has a graph here."""
        check_statistics(model)
        names, slow = self.moving(model, inner, support_x, support_y), dict(model.named_parameters())
        for x, y, queries in zip(unbind(support_x), unbind(support_y), unbind(query_x), strict=True):
            fast = self._adapted(model, inner, slow, names, x, y)
            yield self.call(model, {**slow, **fast, **_buffers(model)}, *arguments(queries))
            del fast

    def _adapted(
        self, model: nn.Module, inner: InnerLoop, slow: dict[str, Tensor], names: list[str], x: Tensor, y: Tensor
    ) -> dict[str, Tensor]:
        """The weights that adapt, `[*shape]`, after the steps of one task."""
        steps = Steps(inner.lr, inner.rule)
        fast, second_order = {name: slow[name] for name in names}, torch.is_grad_enabled() and not inner.first_order

        def task_loss(fast, x, y):
            prediction = self.call(model, {**slow, **fast, **_buffers(model)}, *arguments(x))
            if steps.taken:  # the first step has checked that they fit
                return inner.loss.one_task(prediction, y)
            return loss_of_task(inner.loss, prediction, y, "support_y")

        for _ in range(inner.steps):
            fast = steps.take_alone(fast, _gradient_anyhow(task_loss, fast, x, y, second_order))
        return fast

    def predictions(self, model: nn.Module, weights: Parameters, buffers: Parameters, x: Tensor) -> Tensor:
        slow, outputs = dict(model.named_parameters()), Outputs()
        own = {name: w for name, w in weights.items() if not is_shared(w, slow[name])}
        shared = slow | {name: w for name, w in weights.items() if name not in own}
        found = []
        for task, rows in enumerate(unbind(x)):
            of_task = {name: t[task] for named in (own, buffers) for name, t in named.items()}
            found.append(outputs.taken(self.call(model, shared | of_task, *arguments(rows))))
        return outputs.put_back(_stacked(_some(found)))

    def mapped(self, function: Callable, in_dims: tuple) -> Callable:
        def run(*args):
            found = [function(*_of_task(args, in_dims, task)) for task in range(_tasks(args))]
            return _stacked(_some(found))

        return run

    def exact(self) -> AbstractContextManager:
        return sdpa_kernel(SDPBackend.MATH)

    def gradients_per_task(self, function: Callable, in_dims: tuple, *, second_order: bool) -> Callable:
        @outside_inference_mode
        def run(*args):
            found = [_gradient(function, _of_task(args, in_dims, task), second_order) for task in range(_tasks(args))]
            if not found:
                return pytree.tree_map(lambda w: w.new_zeros(0, *w.shape), args[0])
            return _stacked(found)

        return run


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """A task's own, for `forward` to write into."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@outside_inference_mode
def _gradient_anyhow(function: Callable, fast: dict[str, Tensor], x: Tensor, y: Tensor, second_order: bool):
    return _gradient(function, [fast, x, y], second_order)


def _tasks(args: tuple) -> int:
    return len(pytree.tree_leaves(args[-1])[0])


def _some(found: list) -> list:
    if not found:
        raise ValueError("there are no tasks, and what this model predicts is not known without one")
    return found


def _stacked(found: list):
    if len(found) == 1:  # a view: tasks in turn are one at a time
        return pytree.tree_map(lambda of_task: of_task.unsqueeze(0), found[0])
    return pytree.tree_map(lambda *of_tasks: torch.stack(of_tasks), *found)


def _of_task(args: tuple, in_dims: tuple, task: int) -> list:
    return [_part(arg, dim, task) for arg, dim in zip(args, in_dims, strict=True)]


def _part(arg, dim: int | dict | None, task: int):
    if isinstance(arg, list):
        return [_part(value, dim, task) for value in arg]
    if isinstance(arg, dict):
        return {key: _part(value, dim[key] if isinstance(dim, dict) else dim, task) for key, value in arg.items()}
    return arg if dim is None else arg[task]


def _gradient(function: Callable, args: list, second_order: bool):
    """The gradient of one task's loss for the first argument, a tensor or a dict of them, zeros where the loss does not
    depend on it."""
    at, rest = args[0], args[1:]
    names = list(at) if isinstance(at, dict) else None
    # what has no graph behind it is differentiated for all the same
    leaves = [
        leaf if second_order and leaf.requires_grad else leaf.detach().requires_grad_()
        for leaf in ([at] if names is None else at.values())
    ]
    exact = twice_differentiable(any(leaf.is_cuda for leaf in leaves)) if second_order else nullcontext()
    with torch.enable_grad(), exact:
        loss = function(leaves[0] if names is None else dict(zip(names, leaves, strict=True)), *rest)
        if loss.requires_grad and leaves:
            found = differentiate(loss, leaves, create_graph=second_order, materialize_grads=True)
        else:
            found = [torch.zeros_like(leaf) for leaf in leaves]
    return found[0] if names is None else dict(zip(names, found, strict=True))
