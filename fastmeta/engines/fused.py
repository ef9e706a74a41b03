"""The engine that runs whole inner loops in one op: `fastmeta.functional.meta_loss_mlp`, kernels of our own."""

from __future__ import annotations

from torch import Tensor, nn

from fastmeta.dispatch.backends import forced_backend, why_not
from fastmeta.functional import functional_mlp
from fastmeta.functional.inner_loops import first_layer_cost
from fastmeta.ops.meta_loss_mlp import SPEC

from ._base import InnerLoop, Parameters
from .fused_loop import FusedLoop
from .inspect import MLPSpec, mlp_spec, parameters_of
from .layerwise import LayerwiseEngine, rows

# Weights of one task that a worker holds beside each other (weights, momentum, adjoints): above, they leave its
# second-level cache, and products that the tasks share are faster.
_MOST_WEIGHTS = 256 * 1024


class FusedEngine(LayerwiseEngine):
    """Whole inner loops in one kernel: MLPs with one activation, and a loss that the kernels know."""

    name = "fused"

    def why_not(self, model: nn.Module, inner: InnerLoop, support_x: Tensor) -> str | None:
        reason = super().why_not(model, inner, support_x)
        if reason is not None:
            return reason
        spec = mlp_spec(model)
        if inner.loss.in_kernels is None:
            return inner.loss.why_not_in_kernels
        if spec.activations[-1] != "identity":
            return f"its last layer is followed by {spec.activations[-1]}"
        if len(set(spec.activations[:-1])) > 1:
            return f"its activations differ: {', '.join(sorted(set(spec.activations[:-1])))}"
        if len(set(bias is None for bias in spec.biases)) > 1:
            return "some of its layers have a bias and some have none"
        if inner.target_gradients:
            return "targets that require gradients have none in the kernels"
        return None

    def why_slow(self, model: nn.Module, inner: InnerLoop, support_x: Tensor) -> str | None:
        backend = forced_backend() or ("cuda" if support_x.is_cuda else "cpp")
        args = [support_x if kind == "Tensor" else None for kind in SPEC.argument_types]
        reason = why_not(backend, SPEC, tuple(args))
        if reason is not None or backend == "reference":
            return f"no kernel for it here ({reason or 'the reference was asked for'})"
        named = parameters_of(model)
        weights = [named[name] for name in mlp_spec(model).weights]
        first = weights[0]
        held = sum(w.numel() for w in weights)
        cost = first_layer_cost(support_x.shape[1], 0, first.shape[1], first.shape[0], inner.steps)
        if cost.lowrank < cost.onchip:
            held -= first.numel()
        if held > _MOST_WEIGHTS:
            return f"{held} weights per task outgrow a worker's cache ({_MOST_WEIGHTS})"
        return None

    def adapt(self, model: nn.Module, inner: InnerLoop, support_x: Tensor, support_y: Tensor) -> dict[str, Tensor]:
        loop, slow = self.loop(model, inner)
        fast = loop.adapted(slow, support_x, support_y)
        return slow | {name: w for name, w in fast.items() if slow[name].requires_grad}

    def query(
        self, model: nn.Module, inner: InnerLoop, support_x: Tensor, support_y: Tensor, query_x: Tensor
    ) -> Tensor:
        loop, slow = self.loop(model, inner)
        if inner.loss.in_kernels == "maximum_entropy":  # there may be no trajectories in the query rows
            return functional_mlp(rows(loop.spec, query_x), loop.adapt(slow, support_x, support_y))
        query_y = query_x.new_zeros(()).expand(loop.prediction_shape(slow, query_x))
        if inner.loss.in_kernels == "cross_entropy":
            query_y = support_y.new_zeros(query_y.shape[:2])
        return loop.meta_loss(slow, support_x, support_y, query_x, query_y)[0].logits

    def loop(self, model: nn.Module, inner: InnerLoop) -> tuple[FusedLoop, dict[str, nn.Parameter]]:
        """The loop as the kernels take it, and the slow weights that it starts from."""
        spec, slow = mlp_spec(model), parameters_of(model)
        return FusedLoop(spec, inner, _rates(spec, slow, inner.lr)), slow


def _rates(spec: MLPSpec, slow: Parameters, lr: float):
    """The inner rate, 0 for what is frozen."""
    frozen = [
        tuple(not slow[name].requires_grad for name in names if name is not None)
        for names in zip(spec.weights, spec.biases, strict=True)
    ]
    if not any(map(any, frozen)):
        return lr
    like = slow[spec.weights[0]]
    if all(all(layer) or not any(layer) for layer in frozen):
        # [L, 1]: a vector alone would mean the steps where there are as many of them as layers
        return like.new_tensor([[0.0 if layer[0] else lr] for layer in frozen])
    rates = [
        [slow[name].new_full(slow[name].shape, lr if slow[name].requires_grad else 0.0) for name in names if name]
        for names in (spec.weights, spec.biases)
    ]
    return rates[0], rates[1] or None
