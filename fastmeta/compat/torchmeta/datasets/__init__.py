"""Data sets of images. Of torchmeta's, Omniglot is here; the others can be imported, and say
so when they are called. `utils.data.ClassDataset` makes one of your own images."""

from fastmeta.compat._absent import data_not_here
from fastmeta.compat.torchmeta.datasets import helpers, helpers_tabular
from fastmeta.compat.torchmeta.datasets.omniglot import Omniglot

__all__ = ["Omniglot", "helpers", "helpers_tabular"]
__getattr__ = data_not_here(
    __name__,
    "torchmeta 1.8.0",
    [
        "Bach",
        "CIFARFS",
        "CUB",
        "DoubleMNIST",
        "FC100",
        "Letter",
        "MiniImagenet",
        "Pascal5i",
        "PlantsMargin",
        "PlantsShape",
        "PlantsTexture",
        "TCGA",
        "TieredImagenet",
        "TripleMNIST",
    ],
    "Make a `utils.data.ClassDataset` of your files.",
)
