"""Networks for images: those of few layers. `fastmeta.nn` has residual ones."""

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

__all__ = [
    "CNN4",
    "CNN4Backbone",
    "ConvBase",
    "ConvBlock",
    "MiniImagenetCNN",
    "OmniglotCNN",
    "OmniglotFC",
    "fc_init_",
    "maml_init_",
]

__getattr__ = not_here(
    __name__,
    "learn2learn 0.2.0",
    ("ResNet12", "ResNet12Backbone", "WRN28", "WRN28Backbone", "get_pretrained_backbone"),
)
