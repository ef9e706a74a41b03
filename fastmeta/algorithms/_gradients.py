"""Gradients of the tasks' losses: by formulas for a multi-layer perceptron, by running any other module."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastmeta._trees import first

from ..engines import InnerLoop, Loss, module_engine
from ..engines.inspect import MLPSpec, mlp_spec
from ..engines.layer_formulas import backward, forward, layers, rows, why_no_formulas
from ..engines.vmap import buffers_per_task


def gradient_of_tasks(
    model: nn.Module, loss: Loss, fast: Mapping[str, Tensor], x: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """Gradient `[T, *shape]` of every task's loss for the parameters in `fast`, `[T, *shape]` or shared."""
    if why_no_formulas(model, x) is None:
        return mlp_gradients(mlp_spec(model), loss, dict(model.named_parameters()) | dict(fast), fast, x, y)
    inner = InnerLoop(0.0, 1, not torch.is_grad_enabled(), loss)
    engine = module_engine(model, inner, x, y)
    return engine.gradients(model, inner, fast, buffers_per_task(model, len(first(x))), x, y)


def mlp_gradients(
    spec: MLPSpec, loss: Loss, weights: Mapping[str, Tensor], names: Collection[str], x: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """The same of a multi-layer perceptron, in plain formulas that can be differentiated again.

    `weights` holds all parameters, `names` says which gradients are wanted.
    """
    gradients = {}
    for layer, (a, delta) in enumerate(zip(*layer_gradients(spec, loss, *layers(spec, weights), x, y), strict=True)):
        if spec.weights[layer] in names:
            gradients[spec.weights[layer]] = torch.matmul(delta.mT, a)
        if spec.biases[layer] in names:
            gradients[spec.biases[layer]] = delta.sum(1)
    # what is no part of the chain, such as a head that is not in use, has no part in the loss
    return {name: gradients[name] if name in gradients else torch.zeros_like(weights[name]) for name in names}


def layer_gradients(
    spec: MLPSpec, loss: Loss, weights: Sequence[Tensor], biases: Sequence[Tensor | None], x: Tensor, y: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """The layers' inputs `[T, B, I_l]`, and the gradient of each task's loss at their pre-activations `[T, B, O_l]`."""
    inputs, pre, prediction = forward(spec, weights, biases, rows(spec, x))
    loss.check(prediction.shape, y, "support_y")
    gradient = loss.gradient(prediction, loss.constant(y, prediction))
    return inputs, backward(spec, weights, inputs, pre, prediction, gradient)
