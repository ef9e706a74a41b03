"""The engine that runs whole inner loops in one op: `fastmeta.functional.meta_loss_mlp`, kernels of our own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastmeta.dispatch import tuned
from fastmeta.dispatch.backends import forced_backend, why_not
from fastmeta.functional import functional_mlp
from fastmeta.functional.inner_loops import first_layer_cost
from fastmeta.ops.meta_loss_mlp import SPEC

from ._base import InnerLoop, Parameters
from ._steps import Rates, adapting, rate_of_steps
from .fused_loop import FusedLoop
from .inspect import MLPSpec, mlp_spec, parameters_of
from .layer_formulas import LayerFormulas, rows, why_no_formulas

# Weights of one task that a worker holds beside each other (weights, momentum, adjoints): above, they leave its
# second-level cache, and products that the tasks share are faster.
_MOST_WEIGHTS = 256 * 1024


class FusedEngine(LayerFormulas):
    """Whole inner loops in one kernel: MLPs with one activation, and a loss that the kernels know."""

    name = "fused"

    def why_not(self, model: nn.Module, inner: InnerLoop, support_x: Tensor) -> str | None:
        reason = why_no_formulas(model, support_x)
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
        if inner.rule.clips:
            return "the kernels do not clip gradients"
        if inner.rule.adam is not None:
            return "the kernels take steps of SGD, and steps of Adam were asked for"
        if isinstance(inner.lr, Mapping):
            of_layer = _rates_of_layers(spec, inner.lr)
            by_step = any(rate is not None and len(rate) != 1 for layer in of_layer for rate in layer)
            if by_step and not _one_per_layer(of_layer):
                return "rates that change from step to step are one for each layer in the kernels"
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
        most = tuned.number("fused", _MOST_WEIGHTS, cuda=support_x.is_cuda)
        if held > most:
            return f"{held} weights per task outgrow a worker's cache ({most:.0f})"
        return None

    def adapt(self, model: nn.Module, inner: InnerLoop, support_x: Tensor, support_y: Tensor) -> dict[str, Tensor]:
        loop, slow = self.loop(model, inner)
        fast = loop.adapted(slow, support_x, support_y)
        return slow | {name: fast[name] for name in adapting(slow, inner.lr) if name in fast}

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
        return FusedLoop(spec, inner, _kernel_rates(spec, slow, inner.lr, inner.steps)), slow


def _kernel_rates(spec: MLPSpec, slow: Parameters, lr: float | Rates, steps: int):
    """Rates as `adapt_mlp` takes them, 0 for what does not adapt: a float, a table `[L, K]`, or one per parameter."""
    if not isinstance(lr, Mapping):
        of_kernel = [slow[name] for name in (*spec.weights, *spec.biases) if name is not None]
        if all(p.requires_grad for p in of_kernel):
            return lr
        lr = dict.fromkeys(adapting(slow, lr), of_kernel[0].new_full((1,), lr))
    of_layer = _rates_of_layers(spec, lr)
    if _one_per_layer(of_layer):
        none = slow[spec.weights[0]].new_zeros(steps)
        return torch.stack([none if rate is None else rate_of_steps(rate, steps).flatten() for rate, *_ in of_layer])

    def per_element(names):
        return [lr[name][0].expand(slow[name].shape) if name in lr else torch.zeros_like(slow[name]) for name in names]

    return per_element(spec.weights), None if spec.biases[0] is None else per_element(spec.biases)


def _rates_of_layers(spec: MLPSpec, rates: Rates) -> list[list[Tensor | None]]:
    pairs = zip(spec.weights, spec.biases, strict=True)
    return [[rates.get(name) for name in pair if name is not None] for pair in pairs]


def _one_per_layer(of_layer: list[list[Tensor | None]]) -> bool:
    return all(
        rate is layer[0] and (rate is None or rate.numel() == len(rate)) for layer in of_layer for rate in layer
    )
