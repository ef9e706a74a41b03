"""Results that were found without a graph, and have one all the same for who asks for more than their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastmeta._trees import first, flatten, unflatten

from ..functional.reverse_sweep import RandomState
from .output import MetaOutput


def with_graph_again(
    output: MetaOutput,
    known: Sequence[Tensor | None],
    receivers: Sequence[Tensor],
    run: Callable[[], MetaOutput],
    random: RandomState,
) -> MetaOutput:
    """`output`, detached, whose loss hands out the gradients `known` to `receivers`. Whatever else is differentiated,
    the tasks' losses, the logits or the loss twice, makes `run` find the same with a graph, from the random numbers of
    that state."""
    logits, structure = flatten(output.logits)
    floating = [leaf.is_floating_point() for leaf in logits]
    device = first(output.logits).device.type
    autocast = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def again() -> list[Tensor]:
        now = RandomState(random.devices)
        random.restore()
        try:
            with torch.enable_grad(), autocast:
                found = run()
        finally:
            now.restore()
        return _differentiable(found, floating)

    values = _differentiable(output, floating)
    loss, task_loss, *rest = _Again.apply(again, list(known), len(values), *values, *receivers)
    rest = iter(rest)
    leaves = [next(rest) if wanted else leaf for leaf, wanted in zip(logits, floating, strict=True)]
    return output._replace(loss=loss, task_loss=task_loss, logits=unflatten(structure, leaves))


def _differentiable(output: MetaOutput, floating: Sequence[bool]) -> list[Tensor]:
    leaves = [leaf for leaf, wanted in zip(flatten(output.logits)[0], floating, strict=True) if wanted]
    return [output.loss, output.task_loss, *leaves]


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, again: Callable[[], list[Tensor]], known: list[Tensor | None], count: int, *tensors: Tensor):
        ctx.again, ctx.known, ctx.count = again, known, count
        ctx.save_for_backward(*tensors[count:])
        ctx.set_materialize_grads(False)
        return tuple(value.clone() for value in tensors[:count])

    @staticmethod
    def backward(ctx, of_loss: Tensor | None, *of_rest: Tensor | None):
        receivers, nothing = ctx.saved_tensors, (None,) * (3 + ctx.count)
        if not torch.is_grad_enabled() and all(gradient is None for gradient in of_rest):
            return *nothing, *(None if g is None else g * of_loss for g in ctx.known)
        pairs = [
            (value, gradient)
            for value, gradient in zip(ctx.again(), (of_loss, *of_rest), strict=True)
            if gradient is not None and value.requires_grad
        ]
        if not pairs:
            return *nothing, *[None] * len(receivers)
        values, gradients = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            values, receivers, gradients, allow_unused=True, create_graph=torch.is_grad_enabled()
        )
        return *nothing, *found
