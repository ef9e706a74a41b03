"""The engine for anything: `torch.func` runs the module unchanged, mapped over tasks.

One inner step is `vmap(grad(loss))`. In the first step all tasks share the slow weights, which are then
handed in unmapped, so that linear layers and convolutions run as one dense operation over all rows.

Buffers: each task gets its own copy, and what `forward` writes into them is dropped. So a batch norm in train
mode uses the statistics of the rows it is given (those of one task's support set, then those of its query
set, that is, transductively, as in the published MAML results) and its running statistics never change. In
eval mode it uses its running statistics, as everywhere in PyTorch; when they have never been updated that is
certain to be a mistake, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from fastmeta._trees import Outputs, arguments, first, flatten, tree_map, unflatten

from ..functional.run_again import call_with
from ._base import InnerLoop, Parameters, is_shared
from ._exact import gradients_per_task, mappable, outside_inference_mode, twice_differentiable
from ._losses import check_prediction, loss_of_task
from ._replica import replica
from ._steps import Steps, adapting


class VmapEngine:
    """`torch.func` over tasks: any module, any loss."""

    name = "vmap"

    def why_not(self, model: nn.Module, inner: InnerLoop, support_x: Tensor) -> str | None:
        return None

    def why_slow(self, model: nn.Module, inner: InnerLoop, support_x: Tensor) -> str | None:
        return None

    def adapt(self, model: nn.Module, inner: InnerLoop, support_x: Tensor, support_y: Tensor) -> dict[str, Tensor]:
        slow, steps = dict(model.named_parameters()), Steps(inner.lr, inner.rule)
        fast = {name: slow[name] for name in self.moving(model, inner, support_x, support_y)}
        for _ in range(inner.steps):
            buffers = buffers_per_task(model, len(first(support_x)))
            gradients = self.gradients(model, inner, fast, buffers, support_x, support_y)
            fast = steps.take(fast, gradients)
        return slow | fast

    def moving(self, model: nn.Module, inner: InnerLoop, support_x: Tensor, support_y: Tensor) -> list[str]:
        """Names of the parameters that the steps change."""
        names = adapting(dict(model.named_parameters()), inner.lr)
        if inner.rule.weight_decay and inner.steps and len(first(support_x)):
            used = in_use(model, inner, support_x, support_y)
            names = [name for name in names if name in used]
        return names

    def query(
        self, model: nn.Module, inner: InnerLoop, support_x: Tensor, support_y: Tensor, query_x: Tensor
    ) -> Tensor:
        return self.predict(model, self.adapt(model, inner, support_x, support_y), query_x)

    def predict(self, model: nn.Module, weights: Parameters, x: Tensor) -> Tensor:
        return self.predictions(model, weights, buffers_per_task(model, len(first(x))), x)

    def predictions(self, model: nn.Module, weights: Parameters, buffers: Parameters, x: Tensor) -> Tensor:
        """Predictions `[T, B, C]` for `x` `[T, B, ...]` under `weights` by name, `[T, *shape]` or shared by the tasks,
        and the slow weights where there are none. `buffers` `[T, ...]` are written into, as the module writes into its
        own."""
        slow = dict(model.named_parameters())
        weights = slow | dict(weights)
        rows, inputs = flatten(x)
        outputs = Outputs()

        def task_predict(weights, buffers, rows):
            args, kwargs = arguments(unflatten(inputs, rows))
            return outputs.taken(self.call(model, {**weights, **buffers}, args, kwargs))

        return outputs.put_back(self.mapped(task_predict, (_axes(weights, slow), 0, 0))(weights, dict(buffers), rows))

    def gradients(
        self, model: nn.Module, inner: InnerLoop, fast: Parameters, buffers: Parameters, x: Tensor, y: Tensor
    ) -> dict[str, Tensor]:
        """Gradient `[T, *shape]` of every task's loss for the parameters in `fast`, `[T, *shape]` or shared by the
        tasks. `buffers` as in `predictions`."""
        second_order = torch.is_grad_enabled() and not inner.first_order
        task_loss, axes, args = self._loss(model, inner, fast, buffers, x, y)
        return self.gradients_per_task(task_loss, axes, second_order=second_order)(*args)

    def losses(
        self, model: nn.Module, inner: InnerLoop, fast: Parameters, buffers: Parameters, x: Tensor, y: Tensor
    ) -> Tensor:
        """Every task's loss `[T]`, arguments as in `gradients`. The tasks do not meet, and plain autograd may
        differentiate the sum twice, if that is computed while `exact()` is active."""
        # the loss outside of what is mapped: where it cannot be, it runs for one task after the other
        predictions = self.predictions(model, fast, buffers, x)
        check_prediction(inner.loss, predictions, y, "support_y")
        return inner.loss.per_task(predictions, y)

    def _loss(
        self, model: nn.Module, inner: InnerLoop, fast: Parameters, buffers: Parameters, x: Tensor, y: Tensor
    ) -> tuple[Callable, tuple, tuple]:
        """The loss of one task, and the axes and arguments with which it is mapped."""
        slow = dict(model.named_parameters())
        shared = {name: w for name, w in slow.items() if name not in fast}

        (rows, inputs), (labels, targets) = flatten(x), flatten(y)

        def task_loss(fast, shared, buffers, rows, labels):
            args, kwargs = arguments(unflatten(inputs, rows))
            prediction = self.call(model, {**fast, **shared, **buffers}, args, kwargs)
            return loss_of_task(inner.loss, prediction, unflatten(targets, labels), "support_y")

        return task_loss, (_axes(fast, slow), None, 0, 0, 0), (dict(fast), shared, dict(buffers), rows, labels)

    def call(self, model: nn.Module, weights: Parameters, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """What `model(*args, **kwargs)` gives with `weights`, its parameters and buffers by name, in one task."""
        return call_with(model, weights, args, kwargs)

    def mapped(self, function: Callable, in_dims: tuple) -> Callable:
        """`function` of one task for all of them: arguments have a leading `T` where `in_dims` says 0 (of a dict, for
        each name), and are shared where it says None. The last one holds the tasks: a tensor, or a list of them."""
        run = vmap(function, in_dims=in_dims, randomness="different")

        def written_out(*args):
            with mappable():
                return run(*args)

        return written_out

    def exact(self) -> AbstractContextManager:
        """While active, what is `mapped` can be differentiated twice by plain autograd around it."""
        return twice_differentiable()

    def gradients_per_task(self, function: Callable, in_dims: tuple, *, second_order: bool) -> Callable:
        """As `mapped`, the gradient of `function` for its first argument, exact to the second order if that is
        wanted."""
        return gradients_per_task(function, in_dims, second_order=second_order)


def in_use(model: nn.Module, inner: InnerLoop, x: Tensor, y: Tensor) -> set[str]:
    """The parameters that the first task's loss depends on: `torch.optim.SGD` does not decay others, whose gradient is
    None, where `torch.func` knows no difference from zero."""
    if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        return {name for name, _ in model.named_parameters()}
    return _in_use(model, inner, *(tree_map(lambda leaf: leaf[0], tree) for tree in (x, y)))


@outside_inference_mode
def _in_use(model: nn.Module, inner: InnerLoop, x: Tensor, y: Tensor) -> set[str]:
    leaves = {name: p.detach().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
    # random layers must not find other numbers because of this
    device = first(x).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        loss = loss_of_task(inner.loss, call_with(replica(model), leaves, *arguments(x)), y, "support_y")
        if not loss.requires_grad:
            return set()
        leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name for name, gradient in zip(leaves, found, strict=True) if gradient is not None}


def _axes(weights: Parameters, slow: Parameters) -> dict[str, int | None]:
    return {name: None if is_shared(w, slow[name]) else 0 for name, w in weights.items()}


def check_statistics(model: nn.Module) -> None:
    """Raises ValueError for a batch norm in eval mode whose running statistics have never been updated."""
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.modules.batchnorm._BatchNorm) or layer.training or layer.running_mean is None:
            continue
        if layer.num_batches_tracked is not None and layer.num_batches_tracked.item() == 0:
            raise ValueError(
                f"layer {name!r} ({type(layer).__name__}) is in eval mode, but its running statistics have never been "
                "updated (adaptation does not update them). Build it with track_running_stats=False, or call "
                "torch.func.replace_all_batch_norm_modules_(model), to use each task's own rows in eval mode too"
            )


def buffers_per_task(model: nn.Module, num_tasks: int) -> dict[str, Tensor]:
    """A copy `[T, ...]` of the module's buffers for each task."""
    check_statistics(model)
    # repeat, not expand: forward may write into them
    return {name: b.unsqueeze(0).repeat(num_tasks, *[1] * b.dim()) for name, b in model.named_buffers()}
