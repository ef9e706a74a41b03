"""Gradient descent in the graph."""

from __future__ import annotations

from torch import nn

from ...utils import update_module


class DifferentiableSGD(nn.Module):
    """Called with a module and gradients, replaces each parameter by `p - lr * grad`, in the graph.

    Args:
        lr: step size, a number or a tensor.
    """

    def __init__(self, lr):
        super().__init__()
        self.lr = lr

    def forward(self, module: nn.Module, gradients=None) -> None:
        """`gradients`: one for each of `module.parameters()`, None where a parameter stays; default their `grad`."""
        if gradients is None:
            gradients = [p.grad for p in module.parameters()]
        update_module(module, [None if g is None else g.mul(-self.lr) for g in gradients])
