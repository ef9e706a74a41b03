"""Meta-learning algorithms: modules with `adapt`, `predict` and `forward(TaskBatch) -> MetaOutput`."""

from .anil import ANIL, BOIL
from .caml_incontext import InContextCAML
from .caml_modulation import FiLM, FiLMConv4, FiLMMLP, ModulationCAML
from .hypernetwork import Hypernetwork
from .maml import MAML, FastWeights
from .matching_networks import MatchingNetwork
from .meta_sgd import MetaSGD
from .nearest_neighbour import NearestNeighbour
from .output import MetaOutput
from .protonet import ProtoNet
from .relation_network import RelationConv, RelationMLP, RelationNetwork, relation_encoder
from .ridge import RidgeHead

__all__ = [
    "ANIL",
    "BOIL",
    "MAML",
    "FastWeights",
    "FiLM",
    "FiLMConv4",
    "FiLMMLP",
    "Hypernetwork",
    "InContextCAML",
    "MatchingNetwork",
    "MetaOutput",
    "MetaSGD",
    "ModulationCAML",
    "NearestNeighbour",
    "ProtoNet",
    "RelationConv",
    "RelationMLP",
    "RelationNetwork",
    "RidgeHead",
    "relation_encoder",
]
