"""What matching and relation networks have by default, and residual networks of the usual depths."""

from __future__ import annotations

from torch import nn

from fastmeta.compat.easyfsl._optional import need
from fastmeta.compat.easyfsl.modules.resnet import ResNet

__all__ = [
    "default_matching_networks_query_encoder",
    "default_matching_networks_support_encoder",
    "default_relation_module",
    "resnet10",
    "resnet12",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
]


def _resnet(depth: int, block: str, layers: list[int], **kwargs) -> ResNet:
    blocks = need("torchvision.models.resnet", f"resnet{depth}")
    return ResNet(getattr(blocks, block), layers, **kwargs)


def resnet10(**kwargs) -> ResNet:
    """Keyword arguments are those of `ResNet`; needs torchvision, as do the others."""
    return _resnet(10, "BasicBlock", [1, 1, 1, 1], **kwargs)


def resnet12(**kwargs) -> ResNet:
    return _resnet(12, "BasicBlock", [1, 1, 2, 1], planes=[64, 160, 320, 640], **kwargs)


def resnet18(**kwargs) -> ResNet:
    return _resnet(18, "BasicBlock", [2, 2, 2, 2], **kwargs)


def resnet34(**kwargs) -> ResNet:
    return _resnet(34, "BasicBlock", [3, 4, 6, 3], **kwargs)


def resnet50(**kwargs) -> ResNet:
    return _resnet(50, "Bottleneck", [3, 4, 6, 3], **kwargs)


def resnet101(**kwargs) -> ResNet:
    return _resnet(101, "Bottleneck", [3, 4, 23, 3], **kwargs)


def resnet152(**kwargs) -> ResNet:
    return _resnet(152, "Bottleneck", [3, 8, 36, 3], **kwargs)


def default_matching_networks_support_encoder(feature_dimension: int) -> nn.Module:
    """A bidirectional LSTM of one layer, `[1, S, D]` -> `[1, S, 2 D]`."""
    return nn.LSTM(feature_dimension, feature_dimension, num_layers=1, batch_first=True, bidirectional=True)


def default_matching_networks_query_encoder(feature_dimension: int) -> nn.Module:
    """An LSTM cell that takes the features and what was read from the support set."""
    return nn.LSTMCell(2 * feature_dimension, feature_dimension)


def default_relation_module(feature_dimension: int, inner_channels: int = 8) -> nn.Module:
    """Two blocks of convolution and two linear layers, `[N, 2 K, H, W]` -> `[N, 1]` in (0, 1); any H and W."""

    def block(channels: int, padding: int, size: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(channels, feature_dimension, kernel_size=3, padding=padding),
            nn.BatchNorm2d(feature_dimension, momentum=1, affine=True),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d((size, size)),
        )

    return nn.Sequential(
        block(2 * feature_dimension, 1, 5),
        block(feature_dimension, 0, 1),
        nn.Flatten(),
        nn.Linear(feature_dimension, inner_channels),
        nn.ReLU(),
        nn.Linear(inner_channels, 1),
        nn.Sigmoid(),
    )
