"""Multi-layer perceptrons with their weights as arguments."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmeta import values
from fastmeta.dispatch.backends import ACTIVATIONS
from fastmeta.dispatch.spec import leading_size
from fastmeta.ops import functional_mlp as _functional_mlp

from . import checks
from .autocast import cast


class Nets:
    """The nets of `T` tasks in a form of their own, which know how to run: what `functional_mlp` takes for lists."""

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def functional_mlp(
    x: Tensor,
    weights: Sequence[Tensor] | Nets,
    biases: Sequence[Tensor] | None = None,
    activation: str = "relu",
) -> Tensor:
    """A whole multi-layer perceptron with its weights as arguments, for all tasks in one call.

    `h = activation(h W^T + b)` for every layer, the last one without activation.

    Args:
        x: `[T, B, I]`, floating; the rows of each task. T = 1 with per-task weights gives the same rows to every net.
        weights: one per layer, `[T, O, I]` per task (fast weights) or `[O, I]` shared by the tasks, as
            `nn.Linear.weight`; layers may differ in that. Or the fast weights that `adapt_mlp` returned, which hold
            biases and activation too.
        biases: one per layer, `[T, O]` or `[O]`; None (default) for a net without.
        activation: "relu" (default), "tanh", "sigmoid", "silu", "gelu" (exact), "sine" or "identity".

    Returns:
        `[T, B, O]` with O of the last layer.

    Raises:
        TypeError: a dtype that is not allowed or differs.
        ValueError: shapes or devices that do not fit together, an unknown activation.
    """
    if isinstance(weights, Nets):
        return weights(x)
    key = checks.key("functional_mlp", x, weights, biases, activation)
    known = checks.passed(key)
    if not known:
        checks.tensor("x", x, "[T, B, I]")
        weights = checks.sequence("weights", weights)
        biases = [] if biases is None else checks.sequence("biases", biases)
        if not weights:
            raise ValueError("weights must hold at least one layer, got none")
        if biases and len(biases) != len(weights):
            raise ValueError(f"biases must hold one per layer = {len(weights)}, got {len(biases)}")
        values.choice("activation", activation, ACTIVATIONS)
        for i, weight in enumerate(weights):
            checks.tensor_of_any_shape(f"weights[{i}]", weight)
        for i, bias in enumerate(biases):
            checks.tensor_of_any_shape(f"biases[{i}]", bias)
    weights = [_with_tasks(f"weights[{i}]", w, "[O, I]") for i, w in enumerate(weights)]
    biases = [_with_tasks(f"biases[{i}]", b, "[O]") for i, b in enumerate(biases or ())]
    tensors = cast(_functional_mlp.SPEC.autocast, x, *weights, *biases)
    x, weights, biases = tensors[0], tensors[1 : 1 + len(weights)], tensors[1 + len(weights) :]
    if not known:
        _check_layers(x, weights, biases)
        checks.remember(key)
    return _functional_mlp.SPEC(x, weights, biases, activation)


def _check_layers(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> None:
    tasks = leading_size([x, *weights, *biases])
    checks.choice_of_tasks("x", x, tasks)
    width = x.shape[2]
    for i, weight in enumerate(weights):
        checks.same_kind("x", x, **{f"weights[{i}]": weight})
        checks.choice_of_tasks(f"weights[{i}]", weight, tasks)
        checks.same_size(f"weights[{i}]", weight, 2, "I", "its input", width)
        width = weight.shape[1]
        if biases:
            checks.same_kind("x", x, **{f"biases[{i}]": biases[i]})
            checks.choice_of_tasks(f"biases[{i}]", biases[i], tasks)
            checks.same_size(f"biases[{i}]", biases[i], 1, "O", f"weights[{i}]", width)


def _with_tasks(name: str, value, layout: str) -> Tensor:
    """`[T, ...]` as it is, and what the tasks share with a leading 1."""
    dims = layout.count(",") + 1
    if value.dim() == dims:
        return value.unsqueeze(0)
    if value.dim() != dims + 1:
        raise ValueError(f"{name} must have shape [T, {layout[1:-1]}] or {layout}, got {list(value.shape)}")
    return value
