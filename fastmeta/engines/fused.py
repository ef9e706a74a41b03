"""The engine that runs whole inner loops in one op: `fastmeta.functional.meta_loss_mlp`, kernels of our own."""

from __future__ import annotations

from torch import Tensor, nn

from fastmeta.dispatch.backends import ACTIVATIONS, forced_backend, why_not
from fastmeta.functional import functional_mlp
from fastmeta.functional.inner_loops import MetaLoss, adapt_mlp, first_layer_cost, mean_meta_loss_mlp
from fastmeta.ops.meta_loss_mlp import SPEC

from ._base import InnerLoop, Parameters
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
            return f"the kernels have no loss {inner.loss.name!r}"
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
        spec, slow = mlp_spec(model), parameters_of(model)
        fast = self._adapted(spec, slow, inner, support_x, support_y)
        weights, biases = fast.materialize()
        names = [*spec.weights, *(spec.biases if biases else ())]
        adapted = zip(names, (*weights, *biases), strict=True)
        return slow | {name: w for name, w in adapted if slow[name].requires_grad}

    def _adapted(self, spec: MLPSpec, slow: Parameters, inner: InnerLoop, support_x: Tensor, support_y: Tensor):
        _check_targets(spec, slow, inner, support_x, support_y, "support_y")
        options = _options(spec, slow, inner)
        return adapt_mlp(rows(spec, support_x), inner.loss.kernel_targets(support_y), *_layers(spec, slow), **options)

    def query(
        self, model: nn.Module, inner: InnerLoop, support_x: Tensor, support_y: Tensor, query_x: Tensor
    ) -> Tensor:
        spec, slow = mlp_spec(model), parameters_of(model)
        query_y = query_x.new_zeros(()).expand(_prediction_shape(spec, slow, query_x))
        if inner.loss.in_kernels == "maximum_entropy":  # there may be no trajectories in the query rows
            fast = self._adapted(spec, slow, inner, support_x, support_y)
            return functional_mlp(rows(spec, query_x), fast)
        if inner.loss.in_kernels == "cross_entropy":
            query_y = support_y.new_zeros(query_y.shape[:2])
        return self.meta_loss(model, inner, support_x, support_y, query_x, query_y)[0].logits

    def meta_loss(
        self, model: nn.Module, inner: InnerLoop, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> tuple[MetaLoss, Tensor]:
        """Query loss `[T]` and predictions `[T, Q, C]` in one call; and the mean of the losses."""
        tensors, options = self.arguments(model, inner, support_x, support_y, query_x, query_y)
        return mean_meta_loss_mlp(*tensors, **options)

    def arguments(
        self, model: nn.Module, inner: InnerLoop, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> tuple[tuple, dict]:
        """What `mean_meta_loss_mlp` takes: tensors, and options."""
        spec, slow = mlp_spec(model), parameters_of(model)
        _check_targets(spec, slow, inner, support_x, support_y, "support_y")
        _check_targets(spec, slow, inner, query_x, query_y, "query_y")
        support = rows(spec, support_x), inner.loss.kernel_targets(support_y)
        query = rows(spec, query_x), inner.loss.kernel_targets(query_y)
        return (*support, *query, *_layers(spec, slow)), _options(spec, slow, inner)


def _options(spec: MLPSpec, slow: Parameters, inner: InnerLoop) -> dict:
    hidden = spec.activations[0] if len(spec.activations) > 1 else "identity"
    assert hidden in ACTIVATIONS
    return {
        "lr": _rates(spec, slow, inner.lr),
        "steps": inner.steps,
        "loss": inner.loss.in_kernels,
        "activation": hidden,
        "first_order": inner.first_order,
    }


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


def _layers(spec: MLPSpec, slow: Parameters) -> tuple[list[Tensor], list[Tensor] | None]:
    biases = None if spec.biases[0] is None else [slow[name] for name in spec.biases]
    return [slow[name] for name in spec.weights], biases


def _prediction_shape(spec: MLPSpec, slow: Parameters, x: Tensor) -> tuple[int, int, int]:
    return (*x.shape[:2], slow[spec.weights[-1]].shape[0])


def _check_targets(spec: MLPSpec, slow: Parameters, inner: InnerLoop, x: Tensor, y: Tensor, name: str) -> None:
    inner.loss.check(_prediction_shape(spec, slow, x), y, name, values=False)  # the op looks at those
