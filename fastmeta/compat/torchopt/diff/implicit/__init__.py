"""`torchopt.diff.implicit`: the implicit function theorem."""

from . import decorator, nn
from .decorator import custom_root
from .nn import ImplicitMetaGradientModule

__all__ = ["ImplicitMetaGradientModule", "custom_root", "decorator", "nn"]
