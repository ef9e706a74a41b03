"""The engine that never forms a task's weights: they are the slow weights plus what a few rows have changed.

A gradient step changes a linear layer by outer products of what it saw. With `A_j` `[S, I]` the layer's input and `D_j`
`[S, O]` the loss's gradient at its pre-activation in step `j`, the weights after `k` steps are
`W_k = W - lr sum_j D_j^T A_j` and `b_k = b - lr sum_j D_j^T 1`. So for any rows `H`, exactly::

    pre-activation   H W_k^T + b_k = H W^T + b - lr sum_j (H A_j^T + 1) D_j
    backward         D W_k         = D W       - lr sum_j (D D_j^T) A_j

`W` is shared by all tasks: its products are dense, over all rows of all tasks, and so is its meta-gradient.
The first layer's input never changes, so its dense product and its Gram matrix `X A^T` are computed once for
all steps.

All of it are differentiable torch operations: the exact second-order meta-gradient is one plain backward
pass. What a task adds is `S` rows per step, so this form pays while `inner_steps * S` is small beside the
layers' widths. The formulas below are for plain MLPs; any other module is served by `lowrank_module.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.dispatch import tuned

from . import _activations
from ._base import KEEPS_GRAPH, Engine, InnerLoop, Parameters
from ._steps import PLAIN
from .inspect import MLPSpec, mlp_spec
from .layer_formulas import LayerFormulas, rows, why_no_formulas
from .lowrank_module import LowRankModuleEngine


class LowRankEngine:
    """Low-rank fast weights: explicit formulas in an MLP, probes on the linear layers of any other module."""

    name = "lowrank"

    def why_not(self, model: nn.Module, inner: InnerLoop, support_x: Tensor) -> str | None:
        if inner.sweep:
            return KEEPS_GRAPH
        if isinstance(inner.lr, Mapping):
            return "its rows hold one rate, and rates of layers or steps were asked for"
        if inner.rule != PLAIN:
            return "its rows hold plain gradient steps, without momentum, weight decay, clipping or Adam"
        return _form(model, support_x).why_not(model, inner, support_x)

    def why_slow(self, model: nn.Module, inner: InnerLoop, support_x: Tensor) -> str | None:
        return _form(model, support_x).why_slow(model, inner, support_x)

    def adapt(self, model: nn.Module, inner: InnerLoop, support_x: Tensor, support_y: Tensor) -> dict[str, Tensor]:
        return _form(model, support_x).adapt(model, inner, support_x, support_y)

    def query(
        self, model: nn.Module, inner: InnerLoop, support_x: Tensor, support_y: Tensor, query_x: Tensor
    ) -> Tensor:
        return _form(model, support_x).query(model, inner, support_x, support_y, query_x)

    def predict(self, model: nn.Module, weights: Parameters, x: Tensor) -> Tensor:
        return _form(model, x).predict(model, weights, x)


def _form(model: nn.Module, x: Tensor) -> Engine:
    return _PROBES if why_no_formulas(model, x) else _FORMULAS


class _LowRankFormulas(LayerFormulas):
    name = "lowrank"

    def why_slow(self, model: nn.Module, inner: InnerLoop, support_x: Tensor) -> str | None:
        # Products with the rows of all steps against products with per-task weights: even, as measured on a
        # CPU, where the rows are as many as the layers are wide (in the mean that the count of
        # multiplications asks for).
        shapes = [dict(model.named_parameters())[name].shape for name in mlp_spec(model).weights]
        width = 2 * sum(o * i for o, i in shapes) / sum(o + i for o, i in shapes)
        history = inner.steps * support_x.shape[1]
        if history <= tuned.number("lowrank", 1.0, cuda=support_x.is_cuda) * width:
            return None
        return f"{history} support rows over all steps outnumber the layers' mean width of {width:.0f}"

    def query(
        self, model: nn.Module, inner: InnerLoop, support_x: Tensor, support_y: Tensor, query_x: Tensor
    ) -> Tensor:
        spec = mlp_spec(model)
        named = dict(model.named_parameters())
        layers = [
            _Layer(named[w], None if b is None else named[b]) for w, b in zip(spec.weights, spec.biases, strict=True)
        ]
        support, query = rows(spec, support_x), rows(spec, query_x)
        first = layers[0]
        dense_support, dense_query = (F.linear(x, first.weight, first.bias) for x in (support, query))
        # the rows as factors of the steps' gradients, which count as constants in first order
        seen = support.detach() if inner.first_order else support
        gram_support, gram_query = (first.gram(x, seen) if inner.steps else None for x in (support, query))
        constant = None
        for _ in range(inner.steps):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not inner.first_order):
                inputs, pre, prediction = _forward(spec, layers, dense_support, gram_support)
                if constant is None:
                    inner.loss.check(prediction.shape, support_y, "support_y")
                    constant = inner.loss.constant(support_y, prediction)
                # Everything backward is linear in this gradient, so the step size goes in once, here.
                gradient = inner.loss.gradient(prediction, constant) * -inner.lr
                outputs = [*inputs[1:], prediction]
                deltas = []
                for index in reversed(range(len(layers))):
                    delta = _activations.backward(spec.activations[index], gradient, pre[index], outputs[index])
                    deltas.append(delta)
                    if index:
                        gradient = layers[index].backward(delta)
            for layer, a, delta in zip(layers, inputs, reversed(deltas), strict=True):
                layer.step(a, delta)
        return _forward(spec, layers, dense_query, gram_query)[2]


_FORMULAS, _PROBES = _LowRankFormulas(), LowRankModuleEngine()


class _Layer:
    """One linear layer: shared weight and bias, and the rows that have changed it."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias
        self.adapt_weight = weight.requires_grad
        self.adapt_bias = bias is not None and bias.requires_grad
        self.one = weight.new_ones(1, 1, 1)
        self.inputs: Tensor | None = None  # A of all steps [T, k S, I]; of the first layer, never read
        self.deltas: Tensor | None = None  # -lr D of all steps [T, k S, O]; of the first layer, their sum [T, S, O]

    def gram(self, x: Tensor, inputs: Tensor) -> Tensor:
        """`x A^T + 1`: the 1 is the bias, whose input is always 1."""
        if self.adapt_weight and self.adapt_bias:
            return torch.baddbmm(self.one, x, inputs.mT)
        if self.adapt_weight:
            return torch.bmm(x, inputs.mT)
        return (self.one if self.adapt_bias else self.one * 0).expand(x.shape[0], x.shape[1], inputs.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        z = F.linear(x, self.weight, self.bias)
        return z if self.deltas is None else torch.baddbmm(z, self.gram(x, self.inputs), self.deltas)

    def backward(self, delta: Tensor) -> Tensor:
        gradient = torch.matmul(delta, self.weight)
        if self.deltas is None or not self.adapt_weight:
            return gradient
        return torch.baddbmm(gradient, torch.bmm(delta, self.deltas.mT), self.inputs)

    def step(self, a: Tensor | None, delta: Tensor) -> None:
        if a is None:  # the first layer sees the same rows in every step
            self.deltas = delta if self.deltas is None else self.deltas + delta
        elif self.deltas is None:
            self.inputs, self.deltas = a, delta
        else:
            self.inputs, self.deltas = torch.cat([self.inputs, a], 1), torch.cat([self.deltas, delta], 1)


def _forward(spec: MLPSpec, layers: list[_Layer], dense: Tensor, gram: Tensor | None):
    """As in layerwise, from the first layer's dense product on; the first layer's input is given as None."""
    z = dense if layers[0].deltas is None else torch.baddbmm(dense, gram, layers[0].deltas)
    inputs, pre = [None], [z]
    for layer, activation in zip(layers[1:], spec.activations, strict=False):
        inputs.append(_activations.apply(activation, pre[-1]))
        pre.append(layer.forward(inputs[-1]))
    return inputs, pre, _activations.apply(spec.activations[-1], pre[-1])
