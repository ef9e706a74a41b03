"""The meta-gradient in one call of a kernel: no autograd graph, and what is the same from call to call found once.

For a few small tasks the way through an `nn.Module` and autograd takes longer than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastmeta.dispatch import backends
from fastmeta.dispatch.eager import mean_gradient
from fastmeta.engines import InnerLoop, choose
from fastmeta.engines.fused import FusedEngine
from fastmeta.engines.inspect import Snapshot, mlp_spec, parameters_of
from fastmeta.engines.layer_formulas import rows
from fastmeta.functional import checks
from fastmeta.functional.inner_loops import dense_arguments
from fastmeta.ops.meta_loss_mlp import SPEC

from .output import MetaOutput, judged

if TYPE_CHECKING:
    from ..tasks import TaskBatch

_AT = {name: position for position, name in enumerate(SPEC.argument_names)}
_X, _Y = ([_AT[f"{part}_{kind}"] for part in ("support", "query")] for kind in "xy")
_WEIGHTS, _BIASES = (SPEC.differentiable.index(name) for name in ("weights", "biases"))
# and, on the CPU, without the dimension of tasks where they share a layer: views of results take longer than their sums
_NEEDS = 1 << _WEIGHTS | 1 << _BIASES | 1 << len(SPEC.differentiable)


class DirectGradient:
    """One call with everything in it but the numbers: those of the batch, and those of the parameters, which it sees
    through views. Made inside `inspected(model)`."""

    def __init__(self, model: nn.Module, inner: InnerLoop, batch: TaskBatch, args: tuple, prefix: str):
        self.spec, named = mlp_spec(model), parameters_of(model)
        names = [*self.spec.weights, *(name for name in self.spec.biases if name is not None)]
        self.views = [named[name].detach().unsqueeze(0) for name in names]
        self.snapshot = Snapshot(model)
        # in the model's order: where the parameters' gradients are found
        self.results = [(prefix + name, p.dim(), names.index(name)) for name, p in named.items()]
        self.inner, self.shapes, self.args = inner, checks.key(*batch), list(args)
        count = len(self.spec.weights)
        self.args[_AT["weights"]], self.args[_AT["biases"]] = self.views[:count], self.views[count:]
        self.native = backends.native_arguments(SPEC, tuple(self.args))
        for at in (*_X, *_Y):  # the batch is not kept
            self.args[at] = self.native[at] = None
        self.forced = backends.forced_backend()

    def holds(self, model: nn.Module, inner: InnerLoop, batch: TaskBatch) -> bool:
        """Whether it is the same call but for the numbers."""
        return (
            inner == self.inner
            and self.snapshot.shows(model)  # so do the views: they keep the memory, nothing else can be there
            and checks.key(*batch) == self.shapes
            and backends.forced_backend() == self.forced
        )

    def run(self, batch: TaskBatch, task_weights: Tensor | None = None) -> tuple[MetaOutput, dict[str, Tensor]]:
        """The output, and gradients by name; with `task_weights` `[T]` those of the weighted mean."""
        args, native, loss = self.args.copy(), self.native.copy(), self.inner.loss
        for at, given in zip(_X, (batch.support_x, batch.query_x), strict=True):
            args[at] = rows(self.spec, given)
            native[at] = args[at].contiguous()
        for at, given in zip(_Y, (batch.support_y, batch.query_y), strict=True):
            args[at] = loss.kernel_targets(given)
            native[at] = args[at].contiguous()
        task_weights = None if task_weights is None else task_weights.detach()
        scale = mean_gradient(args[0], task_weights)
        (task_loss, logits), gradients = backends.run_native_gradient(SPEC, args, native, _NEEDS, scale)
        gradients = (*gradients[_WEIGHTS], *gradients[_BIASES])
        mean = None if task_weights is None else (task_weights * task_loss).mean()
        output = judged(loss, logits, batch.query_y, task_loss, mean)
        found = {}
        for name, dims, place in self.results:
            gradient = gradients[place]
            found[name] = gradient if gradient.dim() == dims else gradient.squeeze(0)
        return output, found


def direct_gradient(
    engine: str, model: nn.Module, inner: InnerLoop, batch: TaskBatch, prefix: str
) -> DirectGradient | None:
    """`DirectGradient`, made inside `inspected(model)`; None where the op alone is not all of it. prefix: of the names
    of gradients, before those in the model."""
    if isinstance(inner.lr, Mapping):  # rates may be trained, which needs more of the op's gradients
        return None
    chosen = choose(engine, model, inner, batch.support_x)
    if not isinstance(chosen, FusedEngine) or not all(p.requires_grad for p in parameters_of(model).values()):
        return None
    with torch.no_grad():
        loop, slow = chosen.loop(model, inner)
        tensors, options = loop.arguments(slow, *batch)
        args = dense_arguments(*tensors, **options)
    if args is None or len(parameters_of(model)) != len(args[_AT["weights"]]) + len(args[_AT["biases"]]):
        return None
    direct = DirectGradient(model, inner, batch, args, prefix)
    # of what is no view a copy would be taken, which does not see what an optimizer writes
    whole = all(view.is_contiguous() for view in direct.views)
    return direct if whole and backends.gives_gradient(SPEC, direct.args) else None
