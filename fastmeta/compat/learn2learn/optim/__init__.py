"""Optimisation in the graph: updates, learned transforms of gradients, an optimiser made of both."""

from .learnable_optimizer import LearnableOptimizer
from .parameter_update import ParameterUpdate
from .transforms import (
    KroneckerTransform,
    MetaCurvatureTransform,
    ModuleTransform,
    ReshapedTransform,
    TransformDictionary,
)
from .update_rules import DifferentiableSGD

__all__ = [
    "DifferentiableSGD",
    "KroneckerTransform",
    "LearnableOptimizer",
    "MetaCurvatureTransform",
    "ModuleTransform",
    "ParameterUpdate",
    "ReshapedTransform",
    "TransformDictionary",
]
