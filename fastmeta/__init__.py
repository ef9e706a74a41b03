"""fastmeta: meta-learning and few-shot learning over thousands of tasks in one launch."""

import importlib

from fastmeta import functional
from fastmeta.algorithms import MAML, MetaOutput, ProtoNet
from fastmeta.dispatch.backends import use_backend
from fastmeta.dispatch.labels import check_labels
from fastmeta.functional.accelerate import accelerate
from fastmeta.functional.capture import capture
from fastmeta.tasks import TaskBatch

__version__ = "0.1.0"
__all__ = [
    "MAML",
    "FewShotClassifier",
    "FewShotRegressor",
    "MetaOutput",
    "ProtoNet",
    "TaskBatch",
    "accelerate",
    "capture",
    "check_labels",
    "functional",
    "load",
    "use_backend",
]

# what stands on floors above, or needs an optional package, is imported when it is asked for
_LATER = {"load": "training", "FewShotClassifier": "estimators", "FewShotRegressor": "estimators"}


def __getattr__(name: str):
    if name not in _LATER:
        raise AttributeError(f"module 'fastmeta' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"fastmeta.{_LATER[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
