"""`torchopt.nn.module`."""

from .._meta_module import MetaGradientModule

__all__ = ["MetaGradientModule"]
