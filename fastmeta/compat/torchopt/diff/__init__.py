"""`torchopt.diff`: derivatives of solutions."""

from fastmeta.compat._absent import not_here

from . import implicit

__all__ = ["implicit"]
__getattr__ = not_here(__name__, "TorchOpt 0.7.3", ("zero_order",))
