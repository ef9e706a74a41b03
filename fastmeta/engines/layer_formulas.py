"""The engine for multi-layer perceptrons: every task's own weights, layer by layer, in batched matrix products.

The inner gradient is written out as formulas instead of being asked from autograd::

    z_l = a_{l-1} W_l^T + b_l        a_l = f(z_l)                           forward, rows of one task [S, *]
    d_L = dloss/dz_L                 d_{l-1} = (d_l W_l) * f'(z_{l-1})      backward
    W_l <- W_l - lr d_l^T a_{l-1}    b_l <- b_l - lr column sums of d_l     update

All of it are differentiable torch operations, so the exact second-order meta-gradient is one plain backward
pass: no double backward, no functional transforms. In the first step the weights are those of all tasks, and
every product with them is one dense matrix product over all rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _activations
from ._base import KEEPS_GRAPH, InnerLoop, Parameters
from ._steps import PLAIN, Steps, adapting
from .inspect import MLPSpec, mlp_spec, parameters_of

SEVERAL = "inputs are several tensors"


class LayerFormulas:
    """Explicit formulas on per-task weights: MLPs with any loss."""

    name = "layerwise"

    def why_not(self, model: nn.Module, inner: InnerLoop, support_x: Tensor) -> str | None:
        return why_no_formulas(model, support_x) or (KEEPS_GRAPH if inner.sweep and not inner.first_order else None)

    def why_slow(self, model: nn.Module, inner: InnerLoop, support_x: Tensor) -> str | None:
        return None

    def adapt(self, model: nn.Module, inner: InnerLoop, support_x: Tensor, support_y: Tensor) -> dict[str, Tensor]:
        spec = mlp_spec(model)
        slow = dict(model.named_parameters())
        weights, biases = layers(spec, slow)
        names = set(adapting(slow, inner.lr))
        adapt_weight, adapt_bias = ([n in names for n in group] for group in (spec.weights, spec.biases))
        # everything backward is linear in the loss's gradient: there the step size goes in once, if nothing else does
        steps = Steps(inner.lr, inner.rule) if isinstance(inner.lr, Mapping) or inner.rule != PLAIN else None
        factor = -inner.lr if steps is None else 1.0
        # a factor of the steps' gradients, which count as constants in first order
        x = rows(spec, support_x.detach() if inner.first_order else support_x)
        constant = None
        for _ in range(inner.steps):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not inner.first_order):
                inputs, pre, prediction = forward(spec, weights, biases, x)
                if constant is None:
                    inner.loss.check(prediction.shape, support_y, "support_y")
                    constant = inner.loss.constant(support_y, prediction)
                gradient = inner.loss.gradient(prediction, constant) * factor
                deltas = backward(spec, weights, inputs, pre, prediction, gradient)
            if steps is not None:
                weights, biases = _taken(steps, spec, weights, biases, names, inputs, deltas)
                continue
            for layer, (delta, a) in enumerate(zip(deltas, inputs, strict=True)):
                if adapt_weight[layer]:
                    weights[layer] = torch.baddbmm(weights[layer], delta.mT, a)
                if adapt_bias[layer]:
                    biases[layer] = biases[layer] + delta.sum(1)
        return (
            slow
            | dict(zip(spec.weights, weights, strict=True))
            | {name: b for name, b in zip(spec.biases, biases, strict=True) if name is not None}
        )

    def query(
        self, model: nn.Module, inner: InnerLoop, support_x: Tensor, support_y: Tensor, query_x: Tensor
    ) -> Tensor:
        return self.predict(model, self.adapt(model, inner, support_x, support_y), query_x)

    def predict(self, model: nn.Module, weights: Parameters, x: Tensor) -> Tensor:
        spec = mlp_spec(model)
        return forward(spec, *layers(spec, weights), rows(spec, x))[2]


def _taken(
    steps: Steps, spec: MLPSpec, weights: list[Tensor], biases: list, names: set[str], inputs, deltas
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Weights and biases after a step of any kind, for which the gradients themselves are formed."""
    gradients = {}
    for weight, bias, delta, a in zip(spec.weights, spec.biases, deltas, inputs, strict=True):
        if weight in names:
            gradients[weight] = torch.matmul(delta.mT, a)
        if bias in names:
            gradients[bias] = delta.sum(1)
    named = dict(zip((*spec.weights, *spec.biases), (*weights, *biases), strict=True))
    return layers(spec, named | steps.take({name: named[name] for name in gradients}, gradients))


def why_no_formulas(model: nn.Module, support_x: Tensor) -> str | None:
    """None if the model is an MLP that explicit formulas can serve on this input, else the reason."""
    if not isinstance(support_x, Tensor):
        return SEVERAL
    spec = mlp_spec(model)
    if isinstance(spec, str):
        return spec
    features = support_x.shape[2:].numel()
    if spec.flatten and features != spec.in_features:
        return f"its reshape would mix examples: an example has {features} values, a row {spec.in_features}"
    if not spec.flatten and support_x.dim() != 3:
        return f"examples of shape {tuple(support_x.shape[2:])} are not rows of features"
    dtypes = {p.dtype for p in parameters_of(model).values()} | {support_x.dtype}
    if len(dtypes) != 1:
        return f"parameters and inputs mix dtypes: {', '.join(sorted(str(d) for d in dtypes))}"
    if torch.is_autocast_enabled(support_x.device.type):
        return "autocast is on, which would round the fast weights"
    return None


def rows(spec: MLPSpec, x: Tensor) -> Tensor:
    """`[T, B, ...]` as `[T, B, I]`."""
    return x.flatten(2) if spec.flatten else x


def layers(spec: MLPSpec, named: Parameters) -> tuple[list[Tensor], list[Tensor | None]]:
    """Weights and biases in the order of the layers."""
    return [named[n] for n in spec.weights], [None if n is None else named[n] for n in spec.biases]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.dim() == 2:
        if bias is None or bias.dim() == 1:
            return F.linear(x, weight, bias)
        return F.linear(x, weight) + bias.unsqueeze(1)
    if bias is None:
        return torch.bmm(x, weight.mT)
    return torch.baddbmm(bias if bias.dim() == 1 else bias.unsqueeze(1), x, weight.mT)


def forward(spec: MLPSpec, weights: list[Tensor], biases: list[Tensor | None], x: Tensor):
    """The layers' inputs, their pre-activations, and the prediction."""
    inputs, pre = [], []
    for weight, bias, activation in zip(weights, biases, spec.activations, strict=True):
        inputs.append(x)
        pre.append(_linear(x, weight, bias))
        x = _activations.apply(activation, pre[-1])
    return inputs, pre, x


def backward(spec: MLPSpec, weights, inputs, pre, prediction: Tensor, gradient: Tensor) -> list[Tensor]:
    """From the gradient at the prediction to the gradients at every layer's pre-activation, `[T, S, O_l]`."""
    outputs = [*inputs[1:], prediction]
    deltas: list[Tensor] = []
    for layer in reversed(range(len(weights))):
        delta = _activations.backward(spec.activations[layer], gradient, pre[layer], outputs[layer])
        deltas.append(delta)
        if layer:
            gradient = torch.matmul(delta, weights[layer])
    return deltas[::-1]
