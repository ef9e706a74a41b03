"""Data sets of images: Omniglot."""

from fastmeta.compat._absent import not_here

from .full_omniglot import FullOmniglot

__all__ = ["FullOmniglot"]

__getattr__ = not_here(
    __name__,
    "learn2learn 0.2.0",
    (
        "CIFARFS",
        "CUBirds200",
        "DescribableTextures",
        "FC100",
        "FGVCAircraft",
        "FGVCFungi",
        "MiniImagenet",
        "Quickdraw",
        "TieredImagenet",
        "VGGFlower102",
    ),
)
