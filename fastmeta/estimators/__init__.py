"""Learners adapted to one support set: `Adapted`, and on it the scikit-learn estimators, which are imported when asked
for: that library is optional."""

import importlib

from .adapted import Adapted, learner_of

__all__ = ["Adapted", "FewShotClassifier", "FewShotRegressor", "learner_of"]

_SKLEARN = {"FewShotClassifier": "classifier", "FewShotRegressor": "regressor"}


def __getattr__(name: str):
    if name not in _SKLEARN:
        raise AttributeError(f"module 'fastmeta.estimators' has no attribute {name!r}")
    try:
        importlib.import_module("sklearn")
    except ImportError as error:
        raise ImportError(f"{name} needs scikit-learn 1.6 or newer: pip install scikit-learn") from error
    return getattr(importlib.import_module(f"fastmeta.estimators.{_SKLEARN[name]}"), name)
