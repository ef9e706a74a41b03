"""A loss whose gradients are known before `backward` is called, which hands them out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def with_gradients(loss: Tensor, gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """`loss`, whose `backward` leaves `gradients` (times what multiplies the loss) in `parameters`; only once."""
    return _Known.apply(loss, gradients, *parameters)


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss: Tensor, gradients: Sequence[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        ctx.save_for_backward(*parameters)
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        scaled = [None if gradient is None else gradient * grad_output for gradient in ctx.gradients]
        if torch.is_grad_enabled():
            # Differentiating again would take these gradients for constants, silently: make it an error
            # instead.
            parameters = ctx.saved_tensors
            scaled = [None if g is None else _NotTwice.apply(g, p) for g, p in zip(scaled, parameters, strict=True)]
        return None, None, *scaled


class _NotTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient: Tensor, parameter: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        raise RuntimeError(
            "a meta-gradient that was taken together with its loss cannot be differentiated again: that of task_chunk "
            "(use task_chunk=None), of memory='sweep' (use memory='graph'), of engine 'loop' (use engine='vmap'), of "
            "implicit MAML, of Reptile and of meta_loss"
        )
