"""The meta-loss of many tasks in chunks, with the memory of one chunk.

Adding up chunk losses and calling `backward` once would keep every chunk's graph alive. Instead each chunk's
gradient is taken as soon as its loss is known, and the sum waits in an autograd node for `backward` to be
called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .output import MetaOutput


def chunked_loss(
    run: Callable[..., MetaOutput], batch: Sequence[Tensor], size: int, parameters: list[Tensor]
) -> MetaOutput:
    """`run(*batch)`, `size` tasks at a time. `task_loss` and `logits` come back detached."""
    differentiable = torch.is_grad_enabled() and bool(parameters)
    if differentiable and any(tensor.requires_grad for tensor in batch):
        raise ValueError("task_chunk: inputs that require gradients are not supported, use task_chunk=None")
    num_tasks = batch[0].shape[0]
    outputs: list[MetaOutput] = []
    gradients: list[Tensor | None] = [None] * len(parameters)
    for chunk in zip(*(tensor.split(size) for tensor in batch), strict=True):
        output = run(*chunk)
        if differentiable and output.loss.requires_grad:
            share = output.loss * (len(output.task_loss) / num_tasks)
            for i, gradient in enumerate(torch.autograd.grad(share, parameters, allow_unused=True)):
                if gradient is not None:
                    gradients[i] = gradient if gradients[i] is None else gradients[i].add_(gradient)
        # Detached at once: a result that held on to its graph would keep the chunk in memory.
        outputs.append(MetaOutput(*(None if field is None else field.detach() for field in output)))

    def join(field: str) -> Tensor | None:
        parts = [getattr(output, field) for output in outputs]
        return None if parts[0] is None else torch.cat(parts)

    task_loss = join("task_loss")
    loss = task_loss.mean()
    if differentiable:
        loss = _Ready.apply(loss, gradients, *parameters)
    return MetaOutput(loss, task_loss, join("accuracy"), join("logits"))


class _Ready(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx, loss: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
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
            "a meta-gradient computed with task_chunk cannot be differentiated again; use task_chunk=None"
        )
