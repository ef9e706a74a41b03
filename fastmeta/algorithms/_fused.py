"""Rates by parameter name as the fused inner loops take them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..engines import InnerLoop
from ..engines.fused import FusedEngine
from ..engines.fused_loop import FusedLoop
from ..engines.inspect import MLPSpec, mlp_spec
from ._rates import Rates, rate_of_steps

_FUSED = FusedEngine()


def fused_loop(model: nn.Module, inner: InnerLoop, rates: Rates, x: Tensor) -> FusedLoop | None:
    """The loop for the kernels, or None where they cannot serve the model or the rates."""
    if _FUSED.why_not(model, inner, x) is not None:
        return None
    spec = mlp_spec(model)
    lr = _kernel_rates(spec, dict(model.named_parameters()), rates, inner.steps)
    return None if lr is None else FusedLoop(spec, inner, lr)


def _kernel_rates(spec: MLPSpec, slow: Mapping[str, Tensor], rates: Rates, steps: int):
    """Rates as `adapt_mlp` takes them: a table `[L, K]`, or a tensor per parameter; None if they fit neither."""
    layers = [[name for name in pair if name is not None] for pair in zip(spec.weights, spec.biases, strict=True)]
    of_layer = [[rates.get(name) for name in names] for names in layers]
    scalar = all(rate is None or rate.numel() == len(rate) for layer in of_layer for rate in layer)
    if scalar and all(rate is layer[0] for layer in of_layer for rate in layer):
        none = slow[spec.weights[0]].new_zeros(steps)
        return torch.stack([none if rate is None else rate_of_steps(rate, steps).flatten() for rate, *_ in of_layer])
    if any(rate is not None and len(rate) != 1 for layer in of_layer for rate in layer):
        return None

    def per_element(names):
        return [
            rates[name][0].expand(slow[name].shape) if name in rates else torch.zeros_like(slow[name]) for name in names
        ]

    return per_element(spec.weights), None if spec.biases[0] is None else per_element(spec.biases)
