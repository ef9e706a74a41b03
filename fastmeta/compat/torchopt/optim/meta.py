"""`torchopt.optim.meta`: optimisers that put tensors which remember where they came from in place of parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import alias
from ..base import GradientTransformation, UninitializedState
from ..update import apply_updates


def module_containers(module: nn.Module, with_buffers: bool = True) -> tuple[tuple[dict, ...], tuple[dict, ...]]:
    """The dicts in which a module and its submodules keep their parameters and buffers, as far as they hold any."""
    parts = list(module.modules())
    buffers = tuple(part._buffers for part in parts if part._buffers) if with_buffers else ()
    return tuple(part._parameters for part in parts if part._parameters), buffers


class MetaOptimizer:
    """Steps of any transformation of gradients, on a module.

    Args:
        module: what is stepped; more can be added by `add_param_group`.
        impl: such as `torchopt.adam(...)` or a chain.
    """

    def __init__(self, module: nn.Module, impl: GradientTransformation):
        if not isinstance(impl, GradientTransformation):
            raise TypeError(f"{impl} (type: {type(impl).__name__}) is not a GradientTransformation")
        self.impl = impl
        self.param_containers_groups: list[tuple[dict, ...]] = []
        self.state_groups: list[Any] = []
        self.add_param_group(module)

    def step(self, loss: Tensor) -> None:
        """One step down `loss`. What it does not depend on stays as it is."""
        for i, (containers, state) in enumerate(zip(self.param_containers_groups, self.state_groups, strict=True)):
            places = [(c, name) for c in containers for name, p in c.items() if p is not None]
            params = tuple(c[name] for c, name in places)
            if isinstance(state, UninitializedState):
                state = self.impl.init(params)
            grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
            updates, self.state_groups[i] = self.impl.update(grads, state, params=params, inplace=False)
            for (container, name), p in zip(places, apply_updates(params, updates, inplace=False), strict=True):
                container[name] = p

    def add_param_group(self, module: nn.Module) -> None:
        self.param_containers_groups.append(module_containers(module, with_buffers=False)[0])
        self.state_groups.append(UninitializedState())

    def state_dict(self) -> tuple:
        """The states of the groups, by reference."""
        return tuple(self.state_groups)

    def load_state_dict(self, state_dict: Any) -> None:
        self.state_groups[:] = list(state_dict)


class MetaSGD(MetaOptimizer):
    """`torchopt.sgd` of a module."""

    def __init__(
        self,
        module: nn.Module,
        lr: alias.Rate,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        moment_requires_grad: bool = True,
        maximize: bool = False,
    ):
        super().__init__(
            module,
            alias.sgd(
                lr,
                momentum,
                dampening,
                weight_decay,
                nesterov,
                moment_requires_grad=moment_requires_grad,
                maximize=maximize,
            ),
        )


class MetaAdam(MetaOptimizer):
    """`torchopt.adam` of a module."""

    def __init__(
        self,
        module: nn.Module,
        lr: alias.Rate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        eps_root: float = 0.0,
        moment_requires_grad: bool = True,
        maximize: bool = False,
        use_accelerated_op: bool = False,
    ):
        super().__init__(
            module,
            alias.adam(
                lr,
                betas,
                eps,
                weight_decay,
                eps_root=eps_root,
                moment_requires_grad=moment_requires_grad,
                maximize=maximize,
                use_accelerated_op=use_accelerated_op,
            ),
        )


class MetaAdamW(MetaOptimizer):
    """`torchopt.adamw` of a module."""

    def __init__(
        self,
        module: nn.Module,
        lr: alias.Rate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        eps_root: float = 0.0,
        mask: Any = None,
        moment_requires_grad: bool = False,
        maximize: bool = False,
        use_accelerated_op: bool = False,
    ):
        super().__init__(
            module,
            alias.adamw(
                lr,
                betas,
                eps,
                weight_decay,
                eps_root=eps_root,
                mask=mask,
                moment_requires_grad=moment_requires_grad,
                maximize=maximize,
                use_accelerated_op=use_accelerated_op,
            ),
        )


class MetaRMSProp(MetaOptimizer):
    """`torchopt.rmsprop` of a module."""

    def __init__(
        self,
        module: nn.Module,
        lr: alias.Rate = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        initial_scale: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
    ):
        super().__init__(
            module,
            alias.rmsprop(
                lr,
                alpha,
                eps,
                weight_decay,
                momentum,
                centered,
                initial_scale=initial_scale,
                nesterov=nesterov,
                maximize=maximize,
            ),
        )


class MetaAdaDelta(MetaOptimizer):
    """`torchopt.adadelta` of a module."""

    def __init__(
        self,
        module: nn.Module,
        lr: alias.Rate = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        moment_requires_grad: bool = True,
    ):
        super().__init__(
            module, alias.adadelta(lr, rho, eps, weight_decay, moment_requires_grad=moment_requires_grad)
        )


class MetaAdaGrad(MetaOptimizer):
    """`torchopt.adagrad` of a module."""

    def __init__(
        self,
        module: nn.Module,
        lr: alias.Rate = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
    ):
        super().__init__(
            module, alias.adagrad(lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize=maximize)
        )


class MetaAdaMax(MetaOptimizer):
    """`torchopt.adamax` of a module."""

    def __init__(
        self,
        module: nn.Module,
        lr: alias.Rate = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        moment_requires_grad: bool = True,
    ):
        super().__init__(
            module, alias.adamax(lr, betas, eps, weight_decay, moment_requires_grad=moment_requires_grad)
        )


class MetaRAdam(MetaOptimizer):
    """`torchopt.radam` of a module."""

    def __init__(
        self,
        module: nn.Module,
        lr: alias.Rate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        moment_requires_grad: bool = True,
    ):
        super().__init__(module, alias.radam(lr, betas, eps, weight_decay, moment_requires_grad=moment_requires_grad))


# as torch spells them
MetaAdadelta, MetaAdagrad, MetaAdamax, MetaRMSprop = MetaAdaDelta, MetaAdaGrad, MetaAdaMax, MetaRMSProp
