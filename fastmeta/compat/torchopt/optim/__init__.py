"""`torchopt.optim`: optimisers of leaf tensors, of tuples of tensors, and of modules that are differentiated."""

from . import func, meta
from .base import (
    SGD,
    AdaDelta,
    Adadelta,
    AdaGrad,
    Adagrad,
    Adam,
    AdaMax,
    Adamax,
    AdamW,
    Optimizer,
    RAdam,
    RMSProp,
    RMSprop,
)
from .func import FuncOptimizer

__all__ = [
    "SGD",
    "AdaDelta",
    "AdaGrad",
    "AdaMax",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "FuncOptimizer",
    "Optimizer",
    "RAdam",
    "RMSProp",
    "RMSprop",
    "func",
    "meta",
]
