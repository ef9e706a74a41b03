"""The engine for nets of layers: every layer runs once for all tasks, with each task's own weights.

A multi-layer perceptron has formulas (`layer_formulas.py`). Any other module is run as it is, once, with tensors that
hold all tasks (`_task_tensor.py`). What it computes are then plain torch operations and ops of this package with a task
dimension, so plain autograd finds the inner gradients and theirs: no transforms, no loop.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from fastmeta._trees import arguments, flatten, tree_map, unflatten

from ..functional.second_order import differentiate
from . import _layer_rules  # noqa: F401  (registers the rules)
from ._base import InnerLoop, Parameters, is_shared
from ._exact import outside_inference_mode
from ._task_tensor import TaskTensor
from .layer_formulas import LayerFormulas, why_no_formulas
from .vmap import VmapEngine

_FORMULAS = LayerFormulas()
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


def has_formulas(model: nn.Module, inner: InnerLoop, x: Tensor) -> bool:
    """Whether the formulas serve this, for which the module does not run."""
    return _FORMULAS.why_not(model, inner, x) is None


def has_convolutions(model: nn.Module) -> bool:
    return any(isinstance(layer, _CONVOLUTIONS) for layer in model.modules())


class LayerwiseEngine(VmapEngine):
    """Layer by layer on per-task weights: MLPs by formulas, nets of convolutions by kernels."""

    name = "layerwise"

    def why_not(self, model: nn.Module, inner: InnerLoop, support_x: Tensor) -> str | None:
        if has_formulas(model, inner, support_x):
            return None
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return "it takes inner gradients by plain autograd, outside of torch.compile and torch.func"
        return None

    def why_slow(self, model: nn.Module, inner: InnerLoop, support_x: Tensor) -> str | None:
        if has_formulas(model, inner, support_x) or has_convolutions(model):
            return None
        return "no layer of the model has a kernel of its own for tasks with different weights"

    def adapt(self, model: nn.Module, inner: InnerLoop, support_x: Tensor, support_y: Tensor) -> dict[str, Tensor]:
        if has_formulas(model, inner, support_x):
            return _FORMULAS.adapt(model, inner, support_x, support_y)
        return super().adapt(model, inner, support_x, support_y)

    def query(
        self, model: nn.Module, inner: InnerLoop, support_x: Tensor, support_y: Tensor, query_x: Tensor
    ) -> Tensor:
        if has_formulas(model, inner, support_x):
            return _FORMULAS.query(model, inner, support_x, support_y, query_x)
        return super().query(model, inner, support_x, support_y, query_x)

    def predict(self, model: nn.Module, weights: Parameters, x: Tensor) -> Tensor:
        if why_no_formulas(model, x) is None:
            return _FORMULAS.predict(model, weights, x)
        return super().predict(model, weights, x)

    def predictions(self, model: nn.Module, weights: Parameters, buffers: Parameters, x: Tensor) -> Tensor:
        slow = dict(model.named_parameters())
        weights = slow | dict(weights)
        own = {n: w if is_shared(w, slow[n]) else TaskTensor(w) for n, w in weights.items()}
        rows, inputs = flatten(x)
        own |= {n: TaskTensor(b, kept=True) for n, b in buffers.items()}
        args, kwargs = arguments(unflatten(inputs, [TaskTensor(leaf) for leaf in rows]))
        with self.exact():
            output = self.call(model, own, args, kwargs)
        return tree_map(lambda leaf: _behind(leaf, len(rows[0])), output, "the model's output")

    def gradients(
        self, model: nn.Module, inner: InnerLoop, fast: Parameters, buffers: Parameters, x: Tensor, y: Tensor
    ) -> dict[str, Tensor]:
        slow, tasks = dict(model.named_parameters()), len(flatten(x)[0][0])
        # contiguous once, and not in every kernel
        own = {
            n: w.contiguous().unsqueeze(0).expand(tasks, *w.shape) if is_shared(w, slow[n]) else w
            for n, w in fast.items()
        }

        def losses(own, buffers, x, y):
            return self.losses(model, inner, own, buffers, x, y)

        return _gradients(losses, own, torch.is_grad_enabled() and not inner.first_order, buffers, x, y)

    def mapped(self, function: Callable, in_dims: tuple) -> Callable:
        def run(*args):
            tasks = len(pytree.tree_leaves(args[-1])[0])
            wrapped = [_wrapped(arg, dim) for arg, dim in zip(args, in_dims, strict=True)]
            with self.exact():
                found = function(*wrapped)
            return pytree.tree_map_only(Tensor, lambda leaf: _behind(leaf, tasks), found)

        return run

    def exact(self) -> AbstractContextManager:
        return sdpa_kernel(SDPBackend.MATH)

    def gradients_per_task(self, function: Callable, in_dims: tuple, *, second_order: bool) -> Callable:
        run = self.mapped(function, (0, *in_dims[1:]))

        def gradients(params, *rest):
            tasks = len(pytree.tree_leaves(rest[-1] if rest else params)[0])
            leaves, structure = pytree.tree_flatten(params)
            own = zip(leaves, _dims(params, in_dims[0]), strict=True)
            own = [w.unsqueeze(0).expand(tasks, *w.shape) if dim is None else w for w, dim in own]

            def losses(named: dict[str, Tensor], *rest: Any) -> Tensor:
                return run(pytree.tree_unflatten(list(named.values()), structure), *rest)

            found = _gradients(losses, {str(i): w for i, w in enumerate(own)}, second_order, *rest)
            return pytree.tree_unflatten(list(found.values()), structure)

        return gradients


def _dims(params: Any, dims: Any) -> list:
    if not isinstance(dims, dict):
        return [dims] * len(pytree.tree_leaves(params))
    return [dims[name] for name in params]


def _wrapped(arg: Any, dim: Any) -> Any:
    if isinstance(arg, dict):
        return {key: _wrapped(value, dim[key] if isinstance(dim, dict) else dim) for key, value in arg.items()}
    if isinstance(arg, list):
        return [_wrapped(value, dim) for value in arg]
    return TaskTensor(arg) if dim == 0 else arg


def _behind(leaf: Tensor, tasks: int) -> Tensor:
    return leaf.values if isinstance(leaf, TaskTensor) else leaf.unsqueeze(0).expand(tasks, *leaf.shape)


@outside_inference_mode
def _gradients(losses: Callable, own: dict[str, Tensor], second_order: bool, *data: Any) -> dict[str, Tensor]:
    """Of every task's loss, one of `losses(own, *data)` `[T]`, for its own weights `[T, *shape]`: the tasks do not
    meet. `data` is all that may have been made in inference mode."""
    leaves = {n: w if second_order and w.requires_grad else w.detach().requires_grad_() for n, w in own.items()}
    with torch.enable_grad():
        total = losses(leaves, *data).sum()
        if not (total.requires_grad and leaves):
            return {name: torch.zeros_like(w) for name, w in own.items()}
        found = differentiate(total, list(leaves.values()), create_graph=second_order, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))
