"""Meta-SGD as learn2learn has it: MAML with a learned rate for every element of every parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._attention import called
from .._gradients import gradients_of
from ..utils import clone_module, clone_parameters, update_module
from .base_learner import BaseLearner


def meta_sgd_update(model: nn.Module, lrs: Sequence[Tensor] | None = None, grads=None) -> nn.Module:
    """Replace the parameters of `model` by `p - lr * grad`, in the graph; returns the same module.

    Args:
        model: the module, changed in place; its old tensors are not.
        lrs: a rate for each of `model.parameters()`, of a shape that multiplies with it.
        grads: a gradient for each; those that are None leave their parameter as it is. Where either argument is None,
            the parameters' attributes `_lr` and `grad` count.
    """
    parameters = list(model.parameters())
    if lrs is None or grads is None:
        left = [getattr(p, "_lr", None) for p in parameters]
        pairs = [(lr, None if lr is None else p.grad) for p, lr in zip(parameters, left, strict=True)]
        for p, (_, grad) in zip(parameters, pairs, strict=True):
            if grad is not None:
                p.grad = p._lr = None
    else:
        pairs = zip(lrs, grads, strict=False)
    for p, (lr, grad) in zip(parameters, pairs, strict=False):
        if lr is not None and grad is not None:
            p.update = -(lr * grad)
    return update_module(model)


class MetaSGD(BaseLearner):
    """`clone()` and `adapt(loss)` around any module, with rates that are trained (Li et al. 2017).

    Args:
        model: the module; its parameters are the learner's, under `module.`.
        lr: what all rates begin with; 1.0 by default.
        first_order: whether the gradients of `adapt` are constants; False by default.
        lrs: the rates, one for each of `model.parameters()`; by default an `nn.ParameterList` of their shapes.

    Where it differs from 0.2.0: parameters that stand in several places stay one after `adapt`.
    """

    def __init__(self, model: nn.Module, lr: float = 1.0, first_order: bool = False, lrs=None):
        super().__init__()
        self.module = model
        if lrs is None:
            lrs = nn.ParameterList([nn.Parameter(torch.ones_like(p) * lr) for p in model.parameters()])
        self.lrs = lrs
        self.first_order = first_order

    def forward(self, *args, **kwargs):
        return called(self.module, args, kwargs, second_order=not self.first_order)

    def clone(self) -> MetaSGD:
        """A `MetaSGD` around clones of module and rates, in the graph."""
        return MetaSGD(clone_module(self.module), lrs=clone_parameters(self.lrs), first_order=self.first_order)

    def adapt(self, loss: Tensor, first_order: bool | None = None) -> None:
        """One step on `loss`, as `MAML.adapt`, with each element's own rate. Parameters that the loss does not depend
        on, or that do not require gradients, are refused with RuntimeError."""
        first_order = self.first_order if first_order is None else first_order
        gradients = gradients_of(loss, self.module.parameters(), create_graph=not first_order)
        self.module = meta_sgd_update(self.module, self.lrs, gradients)
