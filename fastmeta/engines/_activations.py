"""Activations and their derivatives as differentiable torch operations.

`apply(name, z)` is the activation; `backward(name, gradient, z, a)` is `gradient * activation'(z)` with `a =
activation(z)`. Both can be differentiated again, which is all that a second-order meta-gradient asks for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_aten = torch.ops.aten

_APPLY = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "sine": torch.sin,
}


def _silu_backward(gradient: Tensor, z: Tensor, a: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(z)  # written out: torch's own silu_backward cannot be differentiated
    return gradient * (sigmoid + a * (1 - sigmoid))


# torch's *_backward operations are single kernels and have derivatives of their own.
_BACKWARD = {
    # detached: the derivative with respect to a is zero, and would be computed and added all the same
    "relu": lambda gradient, z, a: _aten.threshold_backward(gradient, a.detach(), 0),
    "tanh": lambda gradient, z, a: _aten.tanh_backward(gradient, a),
    "sigmoid": lambda gradient, z, a: _aten.sigmoid_backward(gradient, a),
    "silu": _silu_backward,
    "gelu": lambda gradient, z, a: _aten.gelu_backward(gradient, z),
    "sine": lambda gradient, z, a: gradient * torch.cos(z),
}


def apply(name: str, z: Tensor) -> Tensor:
    return z if name == "identity" else _APPLY[name](z)


def backward(name: str, gradient: Tensor, z: Tensor, a: Tensor) -> Tensor:
    return gradient if name == "identity" else _BACKWARD[name](gradient, z, a)
