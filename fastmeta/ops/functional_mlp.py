"""A multi-layer perceptron whose weights are arguments: `h_l = activation(h_{l-1} W_l^T + b_l)`, the last layer without
activation. Weights are one set per task (fast weights) or shared by the tasks; whole nets run in one call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.dispatch.backends import ACTIVATIONS
from fastmeta.dispatch.derivation import derive_backward, vjp_of_reference
from fastmeta.dispatch.library import Op, register
from fastmeta.dispatch.spec import Make, Sample, Workload, leading_size

FUNCTIONS = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "sine": torch.sin,
}


def reference(x: Tensor, weights: list[Tensor], biases: list[Tensor], activation: str) -> Tensor:
    tasks = leading_size([x, *weights, *biases])
    h = x.expand(tasks, -1, -1)
    for layer, weight in enumerate(weights):
        h = h @ weight.transpose(1, 2)
        if biases:
            h = h + biases[layer].unsqueeze(1)
        if layer < len(weights) - 1:
            h = FUNCTIONS[activation](h)
    return h


def fake(x: Tensor, weights: list[Tensor], biases: list[Tensor], activation: str) -> Tensor:
    return x.new_empty(leading_size([x, *weights, *biases]), x.shape[1], weights[-1].shape[1])


def backward(args, grads, needs):
    return BACKWARD(grads[0], *args, needs)


# (T, B, widths, which of x, weights, biases the tasks share, bias)
SIZES = (
    (2, 5, (3, 4, 2), "", True),
    (1, 1, (1, 1), "", True),
    (3, 7, (1, 17, 9, 1), "", True),
    (3, 7, (5, 17, 3), "wb", True),
    (3, 4, (5, 6, 3), "x", True),
    (3, 4, (5, 6, 3), "b", False),
    (2, 17, (63, 33, 129, 5), "", True),
    (2, 70, (3, 4, 2), "x", True),
    (0, 4, (3, 4, 2), "wb", True),
    (0, 4, (3, 4, 2), "x", True),
    (2, 0, (3, 4, 2), "", True),
    (2, 0, (3, 4, 2), "wb", True),
    (2, 4, (0, 4, 2), "", True),
    (2, 4, (3, 0, 2), "", True),
    (2, 4, (3, 4, 0), "", True),
)


def _inputs(make: Make, t, b, widths, shared, bias):
    def lead(kind):
        return 1 if kind in shared else t

    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    return (
        make.normal(lead("x"), b, widths[0]),
        [make.normal(lead("w"), o, i, scale=max(i, 1) ** -0.5) for i, o in pairs],
        [make.normal(lead("b"), o) for _, o in pairs] if bias else [],
    )


def _label(t, b, widths, shared, bias):
    return f"T{t}-B{b}-{'x'.join(map(str, widths))}-shared({shared})" + ("" if bias else "-nobias")


def samples(make: Make):
    for activation in ACTIVATIONS:
        for size in SIZES if activation == "relu" else SIZES[:5]:
            yield Sample(f"{activation}-{_label(*size)}", (*_inputs(make, *size), activation))


def backward_samples(make: Make):
    for activation in ACTIVATIONS:
        for i, size in enumerate(SIZES if activation == "relu" else SIZES[:5]):
            needs = 6 if i == 3 else 7
            inputs = _inputs(make, *size)
            grad = make.normal(leading_size([inputs[0], *inputs[1], *inputs[2]]), size[1], size[2][-1])
            yield Sample(f"{activation}-{_label(*size)}-needs{needs}", (grad, *inputs, activation, needs))


def workloads(make: Make):
    for t, b, widths in ((1000, 20, (1, 40, 40, 1)), (32, 80, (784, 64, 64, 5))):
        x, weights, biases = _inputs(make, t, b, widths, "", True)
        parameters = sum(i * o for i, o in zip(widths[:-1], widths[1:], strict=True))
        yield Workload(
            f"T{t}-B{b}-{'x'.join(map(str, widths))}",
            (x, weights, biases, "relu"),
            flops=2 * t * b * parameters,
            bytes=x.element_size() * t * (b * (widths[0] + widths[-1]) + parameters + sum(widths[1:])),
        )


SPEC = register(
    Op(
        name="functional_mlp",
        arguments="Tensor x, Tensor[] weights, Tensor[] biases, str activation",
        returns="Tensor",
        summary="a whole MLP forward, with weights per task or shared",
        reference=reference,
        fake=fake,
        differentiable=("x", "weights", "biases"),
        backward=backward,
        samples=samples,
        workloads=workloads,
        autocast="lower",
        may_share=("x", "weights", "biases"),
        source="Finn et al. 2017, the learner f_theta",
    )
)
_DERIVED = derive_backward(SPEC)
BACKWARD = register(Op(**_DERIVED, backward=lambda *a: vjp_of_reference(BACKWARD)(*a), samples=backward_samples))
