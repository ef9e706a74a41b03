"""Backbones under the names, and with the state_dicts, that people know."""

from .networks import NORMS, conv4, conv4_1d, mlp
from .residual import resnet12, wrn28_10

__all__ = ["NORMS", "conv4", "conv4_1d", "mlp", "resnet12", "wrn28_10"]
