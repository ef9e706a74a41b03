"""Small layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, lmb):
        super().__init__()
        self.lmb = lmb

    def forward(self, *args, **kwargs):
        return self.lmb(*args, **kwargs)


class Flatten(nn.Module):
    """`[B, ...]` to `[B, -1]`; also of inputs that are not contiguous, which 0.2.0 refuses."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.size(0), -1)


class Scale(nn.Module):
    """`x * alpha` with a learned `alpha` of shape `shape` (an int, a tuple, default `(1,)`) that begins with the number
    `alpha`."""

    def __init__(self, shape=None, alpha: float = 1.0):
        super().__init__()
        shape = (1,) if shape is None else (shape,) if isinstance(shape, int) else tuple(shape)
        self.alpha = nn.Parameter(torch.ones(shape) * alpha)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.alpha


def freeze(module: nn.Module) -> nn.Module:
    """Every parameter off its graph and without `requires_grad`, in place; returns `module`."""
    for p in module.parameters():
        p.detach_()
        p.requires_grad = False
    return module


def unfreeze(module: nn.Module) -> nn.Module:
    """Every parameter with `requires_grad`, in place; returns `module`."""
    for p in module.parameters():
        p.requires_grad = True
    return module
