"""The meta-gradient in plain autograd: one task after the other, each task's part as soon as it is run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmeta._trees import Outputs, unbind

from ..engines import InnerLoop
from ..engines._losses import loss_of_task
from ..engines.loop import LoopEngine
from ..functional.known_gradients import with_gradients
from .output import MetaOutput, judged, weighted


def in_turn(
    engine: LoopEngine, model: nn.Module, inner: InnerLoop, batch: tuple, weights: Tensor | None, trained: list[Tensor]
) -> MetaOutput:
    """What comes of the batch's tasks, with the memory of one; gradients only for what is `trained`, once. All but the
    loss comes back detached."""
    support_x, support_y, query_x, query_y = batch
    targets, outputs = unbind(query_y), Outputs()
    losses: list[Tensor] = []
    leaves: list[list[Tensor]] = []
    gradients: list[Tensor | None] = [None] * len(trained)
    predictions = engine.in_turn(model, inner, support_x, support_y, query_x)
    for task, target in enumerate(targets):
        prediction = next(predictions)
        loss = loss_of_task(inner.loss, prediction, target, "query_y")
        share = loss * ((1.0 if weights is None else weights[task].to(loss.dtype)) / len(targets))
        if trained and share.requires_grad:
            for i, gradient in enumerate(torch.autograd.grad(share, trained, allow_unused=True)):
                if gradient is not None:
                    gradients[i] = gradient if gradients[i] is None else gradients[i].add_(gradient)
        losses.append(loss.detach())
        leaves.append([leaf.detach() for leaf in outputs.taken(prediction)])
        del prediction, loss, share  # or the next task would run beside this one's graph
    logits = outputs.put_back([torch.stack(of_tasks) for of_tasks in zip(*leaves, strict=True)])
    output = weighted(judged(inner.loss, logits, query_y, torch.stack(losses)), weights)
    return output._replace(loss=with_gradients(output.loss, gradients, trained)) if trained else output
