"""Backbones under the names, and with the state_dicts, that people know."""

from .networks import NORMS, conv4, mlp

__all__ = ["NORMS", "conv4", "mlp"]
