"""The arithmetic of inner optimisers, one tensor at a time, in plain PyTorch.

Nothing is changed in place, so a loss of what comes out can be differentiated with respect to all that went in:
weights, gradients, moments and hyper-parameters. These are numbers, or tensors that broadcast against the parameter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmeta.ops.optimizer_steps import root

Number = float | Tensor


def absent(value: Number) -> bool:
    """Whether a hyper-parameter is the number 0, so that its term need not be formed. A tensor may be learned."""
    return not isinstance(value, Tensor) and value == 0


def average(old: Tensor, new: Tensor, decay: Number) -> Tensor:
    """An exponential moving average, one step on."""
    if isinstance(decay, Tensor):
        return decay * old + (1 - decay) * new
    return torch.lerp(new, old, decay)  # the same in one operation


def velocity(
    grad: Tensor, buffer: Tensor | None, momentum: Number, dampening: Number, nesterov: bool
) -> tuple[Tensor, Tensor | None]:
    """What `torch.optim.SGD` steps along instead of the gradient, and its momentum buffer, None before step one."""
    if absent(momentum):
        return grad, buffer
    buffer = grad if buffer is None else momentum * buffer + (1 - dampening) * grad
    return (grad + momentum * buffer if nesterov else buffer), buffer


def adam(
    param: Tensor, mean: Tensor, square: Tensor, lr: Number, correction1: Number, correction2: Number, eps: Number
) -> Tensor:
    """The parameter after a step of Adam, from the averages of the gradient and its square and `1 - beta ** step`."""
    root2 = correction2.sqrt() if isinstance(correction2, Tensor) else math.sqrt(correction2)
    return param - (lr / correction1) * (mean / (root(square) / root2 + eps))


def largest(squares: Tensor | None, square: Tensor) -> Tensor:
    """AMSGrad's running maximum of the average square."""
    return square if squares is None else torch.maximum(squares, square)
