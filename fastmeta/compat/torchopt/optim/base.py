"""`torchopt.optim.base`: optimisers of leaf tensors, as those of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import alias, pytree
from ..base import GradientTransformation, UninitializedState
from ..update import apply_updates
from ._constructor import constructor


class Optimizer:
    """Steps of any transformation of gradients along `.grad`."""

    def __init__(self, params: Iterable[Tensor], impl: GradientTransformation):
        if not isinstance(impl, GradientTransformation):
            raise TypeError(f"{impl} (type: {type(impl).__name__}) is not a GradientTransformation")
        self.impl = impl
        self.param_groups: list[tuple[Tensor, ...]] = []
        self.state_groups: list[Any] = []
        self.add_param_group(params if isinstance(params, (list, tuple)) else tuple(params))

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Zeros in place of the gradients, or None."""
        for p in pytree.tree_leaves(self.param_groups):
            if set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad = torch.zeros_like(p.grad)

    def state_dict(self) -> tuple:
        """The states of the groups, by reference."""
        return tuple(self.state_groups)

    def load_state_dict(self, state_dict: Any) -> None:
        self.state_groups[:] = list(state_dict)

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step; `closure` finds loss and gradients first, and its loss is given back."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for i, (params, state) in enumerate(zip(self.param_groups, self.state_groups, strict=True)):
            if isinstance(state, UninitializedState):
                state = self.impl.init(params)
            grads = tuple(p.grad for p in params)
            updates, self.state_groups[i] = self.impl.update(grads, state, params=params, inplace=True)
            apply_updates(params, updates, inplace=True)
        return loss

    def add_param_group(self, params: Any) -> None:
        self.param_groups.append(pytree.tree_flatten_as_tuple(params)[0])
        self.state_groups.append(UninitializedState())


class SGD(Optimizer):
    """`torchopt.sgd`."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: alias.Rate,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
    ):
        super().__init__(params, alias.sgd(lr, momentum, dampening, weight_decay, nesterov, maximize=maximize))


class Adam(Optimizer):
    """`torchopt.adam`."""

    __init__ = constructor(Optimizer, "params", alias.adam, ("moment_requires_grad",))


class AdamW(Optimizer):
    """`torchopt.adamw`."""

    __init__ = constructor(Optimizer, "params", alias.adamw, ("moment_requires_grad",))


class RMSProp(Optimizer):
    """`torchopt.rmsprop`."""

    __init__ = constructor(Optimizer, "params", alias.rmsprop)


class AdaDelta(Optimizer):
    """`torchopt.adadelta`."""

    __init__ = constructor(Optimizer, "params", alias.adadelta, ("moment_requires_grad",), lr=1.0)


class AdaGrad(Optimizer):
    """`torchopt.adagrad`."""

    __init__ = constructor(Optimizer, "params", alias.adagrad)


class AdaMax(Optimizer):
    """`torchopt.adamax`."""

    __init__ = constructor(Optimizer, "params", alias.adamax, ("moment_requires_grad",), lr=2e-3, eps=1e-8)


class RAdam(Optimizer):
    """`torchopt.radam`."""

    __init__ = constructor(Optimizer, "params", alias.radam, ("moment_requires_grad",), eps=1e-8)


# as torch spells them
Adadelta, Adagrad, Adamax, RMSprop = AdaDelta, AdaGrad, AdaMax, RMSProp
