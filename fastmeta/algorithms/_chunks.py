"""The meta-loss of many tasks in chunks, with the memory of one chunk.

Adding up chunk losses and calling `backward` once would keep every chunk's graph alive. Instead each chunk's
gradient is taken as soon as its loss is known, and the sum waits in an autograd node for `backward` to be
called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastmeta._trees import cat, first, requires_grad, split

from ..functional.known_gradients import with_gradients
from .output import MetaOutput, detached, over_tasks, weighted


def chunked_loss(
    run: Callable[..., MetaOutput],
    batch: Sequence[Tensor],
    weights: Tensor | None,
    size: int,
    parameters: list[Tensor],
    embedded: Tensor | None = None,
) -> MetaOutput:
    """`run(*batch, weights)`, `size` tasks at a time. `task_loss` and `logits` come back detached.

    embedded: `[T, ...]`, what was made of the batch for all tasks at once: `run(*batch, embedded, weights)`. The
    gradient goes on through it, to what made it.
    """
    differentiable = torch.is_grad_enabled() and bool(parameters)
    if differentiable and any(part is not None and requires_grad(part) for part in (*batch, weights)):
        raise ValueError("task_chunk: inputs that require gradients are not supported, use task_chunk=None")
    num_tasks, receivers = len(first(batch[0])), parameters
    if embedded is not None:
        leaf = embedded.detach().requires_grad_(differentiable and embedded.requires_grad)
        batch = (*batch, leaf)
        if leaf.requires_grad:
            parameters, receivers = [*parameters, leaf], [*parameters, embedded]
    outputs: list[MetaOutput] = []
    gradients: list[Tensor | None] = [None] * len(parameters)
    of_tasks = [split(part, size) for part in batch]
    of_tasks.append([None] * len(of_tasks[0]) if weights is None else weights.split(size))
    for chunk in zip(*of_tasks, strict=True):
        output = run(*chunk)
        if differentiable and output.loss.requires_grad:
            share = output.loss * (len(output.task_loss) / num_tasks)
            for i, gradient in enumerate(torch.autograd.grad(share, parameters, allow_unused=True)):
                if gradient is not None:
                    gradients[i] = gradient if gradients[i] is None else gradients[i].add_(gradient)
        # Detached at once: a result that held on to its graph would keep the chunk in memory.
        outputs.append(detached(output))

    output = weighted(joined(outputs), weights)
    if not differentiable:
        return output
    return output._replace(loss=with_gradients(output.loss, gradients, receivers))


def joined(outputs: Sequence[MetaOutput]) -> MetaOutput:
    """One result of those of several groups of tasks, the loss without weights."""

    def join(field: str) -> Tensor | None:
        parts = [getattr(output, field) for output in outputs]
        return None if parts[0] is None else cat(parts, 0, "the model's outputs for the tasks")

    return over_tasks(join("task_loss"), join("accuracy"), join("logits"))
