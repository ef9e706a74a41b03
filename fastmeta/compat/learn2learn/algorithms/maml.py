"""MAML as learn2learn has it: clone the module, adapt the clone by losses of your own, differentiate through it."""

from __future__ import annotations

from torch import Tensor, nn

from .._attention import called
from .._gradients import gradients_of
from ..utils import clone_module, update_module
from .base_learner import BaseLearner


def maml_update(model: nn.Module, lr: float, grads=None) -> nn.Module:
    """Replace the parameters of `model` by `p - lr * grad`, in the graph; returns the same module.

    Args:
        model: the module, changed in place; its old tensors are not.
        lr: step size.
        grads: one for each of `model.parameters()`; those that are None leave their parameter as it is. With another
            number a line is printed, and the first ones count. None: updates are what stands in the parameters'
            attribute `update`, to which `lr` does nothing, as in 0.2.0 (its documentation says `grad`).

    Raises ValueError: a gradient of another shape than its parameter.
    """
    if grads is not None:
        parameters = list(model.parameters())
        if len(grads) != len(parameters):
            print(
                "WARNING:maml_update(): Parameters and gradients have different length. "
                f"({len(parameters)} vs {len(grads)})"
            )
        return _stepped(model, parameters, lr, grads)
    return update_module(model)


def _stepped(model: nn.Module, parameters: list[Tensor], lr: float, grads) -> nn.Module:
    pairs = list(zip(parameters, grads, strict=False))
    for i, (p, g) in enumerate(pairs):  # all before any: a sum would make of it a parameter of another shape
        if g is not None and g.shape != p.shape:
            raise ValueError(f"grads[{i}] must be {list(p.shape)} as its parameter, got {list(g.shape)}")
    for p, g in pairs:
        if g is not None:
            p.update = -lr * g
    return update_module(model)


class MAML(BaseLearner):
    """`clone()` and `adapt(loss)` around any module (Finn, Abbeel, Levine 2017).

    Args:
        model: the module; its parameters are the learner's, under `module.`.
        lr: step size of `adapt`.
        first_order: whether the gradients of `adapt` are constants; False by default.
        allow_unused: whether parameters that a loss does not depend on stay as they are, where else RuntimeError is
            raised; by default as `allow_nograd`.
        allow_nograd: whether parameters without `requires_grad` stay as they are, where else RuntimeError is raised;
            False by default.

    All tasks at once, for losses on a support and a query set: `adapt_batch`.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        first_order: bool = False,
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
    ):
        super().__init__()
        self.module = model
        self.lr = lr
        self.first_order = first_order
        self.allow_nograd = allow_nograd
        self.allow_unused = allow_nograd if allow_unused is None else allow_unused

    def forward(self, *args, **kwargs):
        return called(self.module, args, kwargs, second_order=not self.first_order)

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> None:
        """One gradient step on `loss`, a scalar in the graph of this learner's parameters: each is replaced by
        `p - lr * grad`. Arguments that are None are the learner's own."""
        parameters = list(self.module.parameters())
        gradients = gradients_of(
            loss,
            parameters,
            create_graph=not _or(first_order, self.first_order),
            allow_unused=_or(allow_unused, self.allow_unused),
            allow_nograd=_or(allow_nograd, self.allow_nograd),
        )
        self.module = _stepped(self.module, parameters, self.lr, gradients)

    def clone(
        self,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> MAML:
        """A `MAML` around `clone_module` of the module: what is computed with it has gradients for this learner's
        parameters. Arguments that are None are the learner's own."""
        return MAML(
            clone_module(self.module),
            lr=self.lr,
            first_order=_or(first_order, self.first_order),
            allow_unused=_or(allow_unused, self.allow_unused),
            allow_nograd=_or(allow_nograd, self.allow_nograd),
        )


def _or(value, default):
    return default if value is None else value
