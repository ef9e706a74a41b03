"""`torchopt.optim.meta`: optimisers that put tensors which remember where they came from in place of parameters."""

from __future__ import annotations

from torch import nn

from ... import alias
from .._constructor import constructor
from .base import MetaOptimizer, extract_module_containers


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

    __init__ = constructor(MetaOptimizer, "module", alias.adam, moment_requires_grad=True)


class MetaAdamW(MetaOptimizer):
    """`torchopt.adamw` of a module."""

    __init__ = constructor(MetaOptimizer, "module", alias.adamw)


class MetaRMSProp(MetaOptimizer):
    """`torchopt.rmsprop` of a module."""

    __init__ = constructor(MetaOptimizer, "module", alias.rmsprop)


class MetaAdaDelta(MetaOptimizer):
    """`torchopt.adadelta` of a module."""

    __init__ = constructor(MetaOptimizer, "module", alias.adadelta, moment_requires_grad=True, lr=1.0)


class MetaAdaGrad(MetaOptimizer):
    """`torchopt.adagrad` of a module."""

    __init__ = constructor(MetaOptimizer, "module", alias.adagrad)


class MetaAdaMax(MetaOptimizer):
    """`torchopt.adamax` of a module."""

    __init__ = constructor(MetaOptimizer, "module", alias.adamax, moment_requires_grad=True, lr=2e-3, eps=1e-8)


class MetaRAdam(MetaOptimizer):
    """`torchopt.radam` of a module."""

    __init__ = constructor(MetaOptimizer, "module", alias.radam, moment_requires_grad=True, eps=1e-8)


# as torch spells them
MetaAdadelta, MetaAdagrad, MetaAdamax, MetaRMSprop = MetaAdaDelta, MetaAdaGrad, MetaAdaMax, MetaRMSProp

__all__ = [
    "MetaAdaDelta",
    "MetaAdaGrad",
    "MetaAdaMax",
    "MetaAdadelta",
    "MetaAdagrad",
    "MetaAdam",
    "MetaAdamW",
    "MetaAdamax",
    "MetaOptimizer",
    "MetaRAdam",
    "MetaRMSProp",
    "MetaRMSprop",
    "MetaSGD",
    "extract_module_containers",
]
