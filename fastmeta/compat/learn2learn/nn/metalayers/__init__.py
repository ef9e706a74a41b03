"""Layers around layers."""

from .metamodule import MetaModule
from .parameter_transform import ParameterTransform

__all__ = ["MetaModule", "ParameterTransform"]
