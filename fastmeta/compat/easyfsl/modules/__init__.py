"""Parts that methods are made of, and backbones."""

from fastmeta.compat._absent import not_here
from fastmeta.compat.easyfsl.modules.predesigned_modules import (
    default_matching_networks_query_encoder,
    default_matching_networks_support_encoder,
    default_relation_module,
    resnet10,
    resnet12,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
)
from fastmeta.compat.easyfsl.modules.resnet import ResNet

__all__ = [
    "ResNet",
    "default_matching_networks_query_encoder",
    "default_matching_networks_support_encoder",
    "default_relation_module",
    "resnet10",
    "resnet101",
    "resnet12",
    "resnet152",
    "resnet18",
    "resnet34",
    "resnet50",
]
__getattr__ = not_here(__name__, "easyfsl 1.5.0", ["MultiHeadAttention", "feat_resnet12"], "They are parts of FEAT.")
