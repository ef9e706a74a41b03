"""fastmeta: meta-learning and few-shot learning over thousands of tasks in one launch."""

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
    "MetaOutput",
    "ProtoNet",
    "TaskBatch",
    "accelerate",
    "capture",
    "check_labels",
    "functional",
    "use_backend",
]
