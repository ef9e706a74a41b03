"""`torchopt.diff.zero_order.nn`: a module whose gradients are estimated."""

from . import module
from .module import ZeroOrderGradientModule

__all__ = ["ZeroOrderGradientModule", "module"]
