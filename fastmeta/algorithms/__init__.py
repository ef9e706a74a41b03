"""Meta-learning algorithms: modules with `adapt`, `predict` and `forward(TaskBatch) -> MetaOutput`."""

from .anil import ANIL, BOIL
from .caml_conditional import ConditionalCAML
from .caml_incontext import InContextCAML
from .cavia import CAVIA
from .contrastive import Contrastive
from .fast_weights import FastWeights
from .film import ContextFiLM, ContextFiLMConv4, FiLM, FiLMConv4, FiLMMLP
from .gradient_head import GradientHead
from .hypernetwork import Hypernetwork
from .imaml import ImplicitMAML
from .maml import MAML
from .maml_plus_plus import MAMLPlusPlus
from .matching_networks import MatchingNetwork
from .meta_sgd import MetaSGD
from .modulated_protonet import ModulatedProtoNet
from .nearest_neighbour import NearestNeighbour
from .output import MetaOutput
from .protonet import ProtoNet
from .relation_network import RelationConv, RelationMLP, RelationNetwork, relation_encoder
from .reptile import Reptile
from .ridge import RidgeHead

__all__ = [
    "ANIL",
    "BOIL",
    "CAVIA",
    "MAML",
    "ConditionalCAML",
    "ContextFiLM",
    "ContextFiLMConv4",
    "Contrastive",
    "FastWeights",
    "FiLM",
    "FiLMConv4",
    "FiLMMLP",
    "GradientHead",
    "Hypernetwork",
    "ImplicitMAML",
    "InContextCAML",
    "MAMLPlusPlus",
    "MatchingNetwork",
    "MetaOutput",
    "MetaSGD",
    "ModulatedProtoNet",
    "NearestNeighbour",
    "ProtoNet",
    "Reptile",
    "RelationConv",
    "RelationMLP",
    "RelationNetwork",
    "RidgeHead",
    "relation_encoder",
]
