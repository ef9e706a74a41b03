"""`torchopt.distributed`: calls of functions on other workers, by torch's RPC."""

from torch import distributed as _distributed

from . import api, autograd, world
from .api import *  # noqa: F403
from .world import *  # noqa: F403

__all__ = ["is_available", *api.__all__, *world.__all__]


def is_available() -> bool:
    """Whether this torch has RPC and distributed autograd."""
    return _distributed.is_available() and _distributed.rpc.is_available() and autograd.is_available()
