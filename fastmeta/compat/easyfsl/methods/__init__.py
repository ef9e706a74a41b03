"""Few-shot classifiers: `process_support_set(images [S, ...], labels [S])`, then `classifier(queries [Q, ...])`.

Scores are `[Q, C]`; labels are those from 0 to C - 1.
"""

from fastmeta.compat.easyfsl.methods.bd_cspn import BDCSPN
from fastmeta.compat.easyfsl.methods.feat import FEAT
from fastmeta.compat.easyfsl.methods.few_shot_classifier import FewShotClassifier
from fastmeta.compat.easyfsl.methods.finetune import Finetune
from fastmeta.compat.easyfsl.methods.laplacian_shot import LaplacianShot
from fastmeta.compat.easyfsl.methods.matching_networks import MatchingNetworks
from fastmeta.compat.easyfsl.methods.prototypical_networks import PrototypicalNetworks
from fastmeta.compat.easyfsl.methods.pt_map import PTMAP
from fastmeta.compat.easyfsl.methods.relation_networks import RelationNetworks
from fastmeta.compat.easyfsl.methods.simple_shot import SimpleShot
from fastmeta.compat.easyfsl.methods.tim import TIM
from fastmeta.compat.easyfsl.methods.transductive_finetuning import TransductiveFinetuning

__all__ = [
    "BDCSPN",
    "FEAT",
    "PTMAP",
    "TIM",
    "FewShotClassifier",
    "Finetune",
    "LaplacianShot",
    "MatchingNetworks",
    "PrototypicalNetworks",
    "RelationNetworks",
    "SimpleShot",
    "TransductiveFinetuning",
]
