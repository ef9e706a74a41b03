"""Meta-learning algorithms: modules with `adapt`, `predict` and `forward(TaskBatch) -> MetaOutput`."""

from .maml import MAML, FastWeights
from .output import MetaOutput
from .protonet import ProtoNet

__all__ = ["MAML", "FastWeights", "MetaOutput", "ProtoNet"]
