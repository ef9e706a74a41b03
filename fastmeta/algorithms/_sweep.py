"""The meta-gradient found in `forward`, one inner step at a time: `fastmeta/functional/reverse_sweep.py` for learners.

All tasks are swept at once. Their weights are `[T, *shape]`, the loss of a step is the sum of theirs, and since they do
not meet, each task's Hessian-vector product is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from fastmeta._trees import first, tree_map

from ..engines import InnerLoop
from ..engines._graph_size import tasks_at_once
from ..engines._steps import clipped, rates_at
from ..engines.vmap import VmapEngine, buffers_per_task
from ..functional import reverse_sweep
from ..functional.known_gradients import with_gradients
from ..functional.reverse_sweep import RandomState
from ._chunks import joined
from ._graph_again import with_graph_again
from .output import MetaOutput, detached, judged, weighted

MEMORY = ("auto", "graph", "sweep")


def swept(
    engine: VmapEngine,
    model: nn.Module,
    inner: InnerLoop,
    batch: Sequence[Tensor],
    weights: Tensor | None,
    *,
    every: int,
    of_loss: Sequence[Tensor],
    again: Callable[[], MetaOutput] | None = None,
) -> MetaOutput:
    """What comes of tasks, without a graph but for the loss's: its gradients with respect to the model, the rates,
    `of_loss` and whatever requires gradients in the batch and the weights are known. `every` as in `reverse_sweep`.
    `again` gives the same with a graph, for who wants more of it."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("memory='sweep' cannot run under transforms of torch.func: take memory='graph'")
    given: list[Tensor] = []
    leaves: list[Tensor] = []  # in its place: what is given may be computed from what else is given

    def leaf(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        given.append(tensor)
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1]

    support_x, support_y, query_x, query_y = (tree_map(leaf, part) for part in batch)
    weights = None if weights is None else leaf(weights)
    slow, tasks = dict(model.named_parameters()), len(first(support_x))
    names = engine.moving(model, inner, support_x, support_y)
    shared = [p for name, p in slow.items() if p.requires_grad and name not in names]
    shared += [p for p in of_loss if all(p is not other for other in shared)]
    outputs: list[MetaOutput] = []
    random = RandomState(sorted({p.device.index for p in slow.values() if p.is_cuda}))

    def support_loss(fast: list[Tensor], step: int) -> Tensor:
        buffers = buffers_per_task(model, tasks)
        with nullcontext() if inner.first_order else engine.exact():
            return engine.losses(model, inner, dict(zip(names, fast, strict=True)), buffers, support_x, support_y).sum()

    def query_loss(fast: list[Tensor], at: slice) -> Tensor:
        rows, targets = (tree_map(lambda leaf: leaf[at], part) for part in (query_x, query_y))
        logits = engine.predict(model, slow | dict(zip(names, fast, strict=True)), rows)
        live = weighted(judged(inner.loss, logits, targets), None if weights is None else weights[at])
        outputs.append(detached(live))
        return live.loss * (len(live.task_loss) / tasks)

    def of_queries(fast: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        """The gradients of the query loss, of some tasks after the other where a graph of all would be large. Who can
        ask for a graph again wants random numbers drawn for all at once."""
        size = tasks_at_once(model, query_x) if again is None else tasks
        adjoints, of_also = [], [None] * len(also)
        for start in range(0, tasks, size):
            at = slice(start, start + size)
            _, adjoint, own = loop.outer_gradient(partial(query_loss, at=at), [w[at] for w in fast], also)
            adjoints.append(adjoint)
            of_also = [reverse_sweep.total(*both) for both in zip(of_also, own, strict=True)]
        return [parts[0] if size >= tasks else torch.cat(parts) for parts in zip(*adjoints, strict=True)], of_also

    def clip(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        found = {name: g for name, g in zip(names, gradients, strict=True) if g is not None}
        found = clipped(found, inner.rule)
        return [found.get(name) for name in names]

    loop = reverse_sweep.InnerLoop(
        support_loss,
        [rates_at(inner.lr, names, step) for step in range(inner.steps)],
        momentum=inner.rule.momentum,
        weight_decay=inner.rule.weight_decay,
        first_order=inner.first_order,
        every=every,
        clip=clip if inner.rule.clips else None,
        allow_unused=True,
        name="the support loss",
    )
    also = [*shared, *leaves]
    fast = loop.adapt([slow[name].detach().expand(tasks, *slow[name].shape) for name in names])
    adjoint, of_also = of_queries(fast)
    found = loop.sweep(adjoint, also, of_also)
    output = weighted(joined(outputs), None if weights is None else weights.detach())
    of_slow = [g.sum(0) if reached else None for g, reached in zip(found.gradients, found.reached, strict=True)]
    learned, of_learned = _of_learned_rates(inner, found.rate_gradients)
    known = [*of_slow, *of_learned, *found.also_gradients]
    receivers = [*(slow[name] for name in names), *learned, *shared, *given]
    if again is not None:
        return with_graph_again(output, known, receivers, again, random)
    return output._replace(loss=with_gradients(output.loss, known, receivers))


def _of_learned_rates(
    inner: InnerLoop, found: Sequence[tuple[Tensor, Tensor]]
) -> tuple[list[Tensor], Sequence[Tensor | None]]:
    """The loop's rates that are trained, and their gradients, from those of the steps' rates."""
    if not found:
        return [], []
    learned = list({id(rate): rate for rate in inner.lr.values() if rate.requires_grad}.values())
    of_steps, gradients = zip(*found, strict=True)
    return learned, torch.autograd.grad(of_steps, learned, gradients, allow_unused=True)
