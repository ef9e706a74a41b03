"""`torchopt.nn`: modules whose derivatives are found another way than through their steps."""

from .._meta_module import MetaGradientModule
from .._stateless import reparameterize, reparametrize, swap_state
from ..diff.implicit.nn import ImplicitMetaGradientModule
from ..diff.zero_order.nn import ZeroOrderGradientModule
from . import module, stateless

__all__ = [
    "ImplicitMetaGradientModule",
    "MetaGradientModule",
    "ZeroOrderGradientModule",
    "module",
    "reparameterize",
    "reparametrize",
    "stateless",
    "swap_state",
]
