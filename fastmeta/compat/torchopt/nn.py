"""`torchopt.nn`: modules whose derivatives are found another way than through their steps."""

from fastmeta.compat._absent import not_here

from ._meta_module import MetaGradientModule
from ._stateless import reparameterize, reparametrize, swap_state
from .diff.implicit.nn import ImplicitMetaGradientModule

__all__ = ["ImplicitMetaGradientModule", "MetaGradientModule", "reparameterize", "reparametrize", "swap_state"]
__getattr__ = not_here(__name__, "TorchOpt 0.7.3", ("ZeroOrderGradientModule",))
