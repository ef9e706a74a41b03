"""`torchopt.diff.zero_order`: gradients from values alone. The module itself can be called, as `zero_order`."""

import sys
from types import ModuleType

from . import decorator, nn
from .decorator import zero_order
from .nn import ZeroOrderGradientModule

__all__ = ["ZeroOrderGradientModule", "decorator", "nn", "zero_order"]


class _Callable(ModuleType):
    def __call__(self, *args, **kwargs):
        return zero_order(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
