"""Modules that meta-learning needs beside `torch.nn`'s."""

from .kroneckers import KroneckerLinear, KroneckerLSTM, KroneckerRNN, kronecker_addmm
from .metalayers import MetaModule, ParameterTransform
from .metaoptnet import SVClassifier
from .misc import Flatten, Lambda, Scale, freeze, unfreeze
from .protonet import PrototypicalClassifier

__all__ = [
    "Flatten",
    "KroneckerLSTM",
    "KroneckerLinear",
    "KroneckerRNN",
    "Lambda",
    "MetaModule",
    "ParameterTransform",
    "PrototypicalClassifier",
    "SVClassifier",
    "Scale",
    "freeze",
    "kronecker_addmm",
    "unfreeze",
]
