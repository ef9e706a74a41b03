"""`torchopt.diff.implicit.nn`: a module whose parameters are a solution."""

from . import module
from .module import ImplicitMetaGradientModule

__all__ = ["ImplicitMetaGradientModule", "module"]
