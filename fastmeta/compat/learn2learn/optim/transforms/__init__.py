"""What makes, of a parameter, the module that its gradients pass through."""

from .kronecker_transform import KroneckerTransform
from .metacurvature_transform import MetaCurvatureTransform
from .module_transform import ModuleTransform, ReshapedTransform
from .transform_dictionary import TransformDictionary

__all__ = [
    "KroneckerTransform",
    "MetaCurvatureTransform",
    "ModuleTransform",
    "ReshapedTransform",
    "TransformDictionary",
]
