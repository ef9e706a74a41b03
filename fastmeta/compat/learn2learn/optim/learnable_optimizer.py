"""An optimiser whose steps are differentiable, so that what transforms the gradients learns from the next loss."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from ..utils import update_module


class LearnableOptimizer(nn.Module):
    """Steps `p <- p - lr * transform(p.grad)`, in the graph of the transforms' parameters alone.

    The next `backward` then has gradients for the model and for the transforms; another optimiser over `parameters()`
    trains these. Between steps the model's parameters are tensors with a graph of one step.

    Args:
        model: the module that is stepped, changed in place; not one of this module's own.
        transform: a callable from a parameter to an `nn.Module`, as `optim.transforms` has them.
        lr: step size; 1.0 by default.
    """

    def __init__(self, model: nn.Module, transform, lr: float = 1.0):
        super().__init__()
        assert isinstance(model, nn.Module), "model should inherit from nn.Module."
        self.info = {"model": model}  # in a dict, so that it is no child
        self.transforms = nn.ModuleList([transform(p) for p in model.parameters()])
        self.lr = lr

    def step(self, closure=None) -> None:
        """One step from the gradients in `p.grad`; parameters without one stay as they are."""
        model = self.info["model"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of reading .grad where a tensor is no leaf
            for p, transform in zip(model.parameters(), self.transforms, strict=False):
                if p.grad is not None:
                    update = -self.lr * transform(p.grad.detach())
                    p.detach_()
                    p.requires_grad = False
                    p.update = update
            update_module(model)
            for p in model.parameters():
                if p.requires_grad:
                    p.retain_grad()

    def zero_grad(self) -> None:
        """Zeros for the model's gradients, as new tensors: the old ones are in the graph of the last step. Those of the
        transforms are their optimiser's."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for p in self.info["model"].parameters():
                if p.grad is not None:
                    p.grad = torch.zeros_like(p.data)
