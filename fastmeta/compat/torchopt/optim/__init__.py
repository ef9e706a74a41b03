"""`torchopt.optim`: optimisers of leaf tensors, of tuples of tensors, and of modules that are differentiated."""

from fastmeta.compat._absent import not_here

from . import func, meta
from .base import SGD, Adam, AdamW, Optimizer, RMSProp, RMSprop
from .func import FuncOptimizer

__all__ = ["SGD", "Adam", "AdamW", "FuncOptimizer", "Optimizer", "RMSProp", "RMSprop", "func", "meta"]
__getattr__ = not_here(
    __name__, "TorchOpt 0.7.3", ("AdaDelta", "Adadelta", "AdaGrad", "Adagrad", "AdaMax", "Adamax", "RAdam")
)
