"""Networks for images."""

from fastmeta.compat._absent import not_here

from .cnn4 import (
    CNN4,
    CNN4Backbone,
    ConvBase,
    ConvBlock,
    MiniImagenetCNN,
    OmniglotCNN,
    OmniglotFC,
    fc_init_,
    maml_init_,
)
from .resnet12 import ResNet12, ResNet12Backbone
from .wrn28 import WRN28, WRN28Backbone

__all__ = [
    "CNN4",
    "CNN4Backbone",
    "ConvBase",
    "ConvBlock",
    "MiniImagenetCNN",
    "OmniglotCNN",
    "OmniglotFC",
    "ResNet12",
    "ResNet12Backbone",
    "WRN28",
    "WRN28Backbone",
    "fc_init_",
    "maml_init_",
]

__getattr__ = not_here(__name__, "learn2learn 0.2.0", ("get_pretrained_backbone",))
