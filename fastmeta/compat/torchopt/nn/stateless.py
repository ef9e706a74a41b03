"""`torchopt.nn.stateless`."""

from .._stateless import reparameterize, reparametrize, swap_state

__all__ = ["reparameterize", "reparametrize", "swap_state"]
