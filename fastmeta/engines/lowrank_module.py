"""Low-rank fast weights for any module: its own `forward` runs, with probes on the linear layers.

Add a zero probe to the output of a linear layer: the loss's gradient with respect to the probe is `D`, that with
respect to the output, and with the layer's input `A` it says all that an inner step does to the layer: `W - lr D^T A`.
Later runs answer the layer's call with `x W^T + b - lr sum_j (x A_j^T + 1) D_j` (see `lowrank.py`), so that its
products with `W` are dense, over all rows of all tasks, and no task's weight is formed. Every other parameter has a
copy per task: those of norms, convolutions and embeddings, those that `forward` uses directly, and the linear layers
that so many support rows change that low rank does not pay.

The module runs under `torch.func.vmap`, once for all tasks, and the inner gradient is taken outside of it: the tasks
do not meet, so the gradient of the sum of their losses is every task's own. That is cheaper than `vmap` of `grad`, and
plain autograd has the derivatives that `vmap` of `grad` gets wrong (see `_exact.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils import _pytree as pytree

from fastmeta._trees import Outputs

from ..functional.run_again import call_with
from ..functional.second_order import differentiate
from ._base import InnerLoop, Parameters
from ._exact import mappable, outside_inference_mode, twice_differentiable
from ._linears import Answer, LowRank, Mapped
from ._losses import check_prediction
from ._trace import PathChanged, Trace, Use, forget, give_up, is_part, traced
from .layer_formulas import SEVERAL
from .vmap import VmapEngine, buffers_per_task

# Low rank pays while the rows that have changed a layer are at most this many times its width: measured even on a CPU.
ROWS_PER_WIDTH = 1.0

_VMAP = VmapEngine()
_Result = TypeVar("_Result")


class LowRankModuleEngine:
    """Low-rank fast weights for the linear layers of any module, a copy per task of its other parameters."""

    name = "lowrank"

    def why_not(self, model: nn.Module, inner: InnerLoop, support_x: Tensor) -> str | None:
        """As in `Engine`. The first call for a model and a size of support set runs `forward` once, on one task."""
        if torch.compiler.is_compiling():
            return "torch.compile cannot follow how the module's linear layers are found"
        if not isinstance(support_x, Tensor):
            return SEVERAL
        if torch.is_autocast_enabled(support_x.device.type):
            return "autocast is on, which would round the fast weights"
        if support_x.shape[0] == 0:
            return "torch.func cannot map over no tasks"
        found = traced(model, support_x)
        if isinstance(found, str):
            return found
        return None if found.uses else "no linear layer is adapted (or only by other means than F.linear)"

    def why_slow(self, model: nn.Module, inner: InnerLoop, support_x: Tensor) -> str | None:
        if _that_pay(model, inner, traced(model, support_x)).uses or inner.steps == 0:
            return None
        return "the support rows of all steps outnumber the width of every linear layer"

    def adapt(self, model: nn.Module, inner: InnerLoop, support_x: Tensor, support_y: Tensor) -> dict[str, Tensor]:
        def run():
            found, layers, fast = _adapt(model, inner, support_x, support_y)
            weights = dict(model.named_parameters()) | fast
            for name, layer in layers.items():
                weights[name], bias = layer.dense(support_x.shape[0])
                if bias is not None:
                    weights[found.biases[name]] = bias
            return weights

        return _retraced(model, support_x, run, lambda: _VMAP.adapt(model, inner, support_x, support_y))

    def query(
        self, model: nn.Module, inner: InnerLoop, support_x: Tensor, support_y: Tensor, query_x: Tensor
    ) -> Tensor:
        if inner.steps == 0:
            return self.predict(model, dict(model.named_parameters()), query_x)

        def run():
            _, layers, fast = _adapt(model, inner, support_x, support_y)
            for layer in layers.values():
                layer.finish()
            return _run(model, layers, fast, query_x)[0]

        return _retraced(model, support_x, run, lambda: _VMAP.query(model, inner, support_x, support_y, query_x))

    def predict(self, model: nn.Module, weights: Parameters, x: Tensor) -> Tensor:
        return _VMAP.predict(model, weights, x)


def _that_pay(model: nn.Module, inner: InnerLoop, found: Trace) -> Trace:
    """The layers for which products with the rows of all steps are cheaper than products with per-task weights."""
    slow = dict(model.named_parameters())
    rows = dict.fromkeys(found.biases, 0)
    for use in found.uses:
        rows[use.weight] += use.rows * (1 if use.weight in found.constant else inner.steps)
    width = {weight: 2 * slow[weight].numel() / max(sum(slow[weight].shape), 1) for weight in rows}
    return found.only({weight for weight in rows if rows[weight] <= ROWS_PER_WIDTH * width[weight]})


def _retraced(model: nn.Module, x: Tensor, run: Callable[[], _Result], otherwise: Callable[[], _Result]) -> _Result:
    """`run`, with a fresh trace if `forward` has changed since the first; `otherwise` if it never stays the same."""
    for _ in range(2):
        try:
            return run()
        except PathChanged:
            forget(model, x)
    give_up(model, x)
    return otherwise()


@outside_inference_mode
def _adapt(
    model: nn.Module, inner: InnerLoop, support_x: Tensor, support_y: Tensor
) -> tuple[Trace, dict[str, LowRank], dict[str, Tensor]]:
    """The trace of the layers in low-rank form, these layers, and the other parameters' fast weights `[T, *shape]`."""
    found = traced(model, support_x)
    if isinstance(found, str):
        raise PathChanged
    found = _that_pay(model, inner, found)
    slow, tasks = dict(model.named_parameters()), support_x.shape[0]
    layers = {
        weight: LowRank(slow[weight], None if bias is None else slow[bias], weight in found.constant)
        for weight, bias in found.biases.items()
    }
    if inner.steps == 0:
        return found, {}, {}
    low_rank = {*found.biases, *found.biases.values()}
    fast = {n: p.expand(tasks, *p.shape) for n, p in slow.items() if p.requires_grad and n not in low_rank}
    probes = [slow[use.weight].new_zeros(tasks, use.rows, use.shape[-1]) for use in found.uses]

    def loss(leaves: tuple[list[Tensor], dict[str, Tensor]]):
        probes, fast = leaves
        prediction, inputs = _run(model, layers, fast, support_x, found.uses, probes)
        check_prediction(inner.loss, prediction, support_y, "support_y")
        # Everything backward is linear in this, so the step size goes in once, here.
        return inner.loss.per_task(prediction, support_y).sum() * -inner.lr, inputs

    for _ in range(inner.steps):
        (deltas, changes), inputs = _gradient(loss, (probes, fast), torch.is_grad_enabled() and not inner.first_order)
        _step(layers, found.uses, inputs, deltas, support_x)
        fast = {name: weight + changes[name] for name, weight in fast.items()}
    return found, layers, fast


def _step(layers: dict[str, LowRank], uses: tuple[Use, ...], inputs, deltas, support_x: Tensor) -> None:
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for use, a, d in zip(uses, inputs, deltas, strict=True):
        rows.setdefault(use.weight, []).append((a, d))
    for name, pairs in rows.items():
        a, d = pairs[0] if len(pairs) == 1 else (torch.cat(tensors, 1) for tensors in zip(*pairs, strict=True))
        if layers[name].is_constant and not is_part(a, support_x):
            if layers[name].blocks:
                raise PathChanged
            layers[name].is_constant = False
        layers[name].append(a, d)


def _run(
    model: nn.Module,
    layers: dict[str, LowRank],
    fast: dict[str, Tensor],
    x: Tensor,
    uses: tuple[Use, ...] | None = None,
    probes: list[Tensor] | tuple[()] = (),
) -> tuple[Tensor, list[Tensor]]:
    """Predictions `[T, B, C]`, and with `uses` what each use of a layer was given, `[T, rows, I]`."""

    outputs = Outputs()

    def one_task(fast, mapped, buffers, x):
        with Answer(layers, uses, mapped) as answer:
            prediction = call_with(model, {**fast, **buffers}, (x,))
        if uses is not None and len(answer.inputs) != len(uses):
            raise PathChanged
        return outputs.taken(prediction), answer.inputs

    mapped = Mapped(
        {name: layer.blocks for name, layer in layers.items()},
        {name: layer.products for name, layer in layers.items() if uses is not None},
        list(probes),
    )
    # The query set needs one derivative only; but of attention, the plain form is also the one that vmap does not run
    # task by task.
    with mappable() if uses is None else twice_differentiable():
        found, inputs = vmap(one_task, randomness="different")(fast, mapped, buffers_per_task(model, x.shape[0]), x)
    return outputs.put_back(found), inputs


def _gradient(function: Callable, leaves, second_order: bool):
    """The gradient of `function(leaves) -> (scalar, auxiliary)`, shaped like `leaves`, and the auxiliary."""
    if torch._C._are_functorch_transforms_active():
        with torch.set_grad_enabled(second_order):
            gradients, auxiliary = torch.func.grad(function, has_aux=True)(leaves)
    else:  # one graph for both orders, where torch.func.grad under autograd records two
        flat, spec = pytree.tree_flatten(leaves)
        flat = [leaf if second_order and leaf.requires_grad else leaf.detach().requires_grad_() for leaf in flat]
        with torch.enable_grad():
            value, auxiliary = function(pytree.tree_unflatten(flat, spec))
            gradients = [torch.zeros_like(leaf) for leaf in flat]
            if value.requires_grad and flat:
                gradients = differentiate(value, flat, create_graph=second_order, materialize_grads=True)
        gradients = pytree.tree_unflatten(gradients, spec)
    if not second_order:
        auxiliary = pytree.tree_map(Tensor.detach, auxiliary)
    return gradients, auxiliary
