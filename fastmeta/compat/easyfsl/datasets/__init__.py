"""Data sets whose labels can be had without their images."""

from fastmeta.compat._absent import not_here
from fastmeta.compat.easyfsl.datasets.easy_set import EasySet
from fastmeta.compat.easyfsl.datasets.features_dataset import FeaturesDataset
from fastmeta.compat.easyfsl.datasets.few_shot_dataset import FewShotDataset
from fastmeta.compat.easyfsl.datasets.support_set_folder import SupportSetFolder
from fastmeta.compat.easyfsl.datasets.wrap_few_shot_dataset import WrapFewShotDataset

__all__ = ["EasySet", "FeaturesDataset", "FewShotDataset", "SupportSetFolder", "WrapFewShotDataset"]
__getattr__ = not_here(
    __name__,
    "easyfsl 1.5.0",
    ["CUB", "DanishFungi", "MiniImageNet", "TieredImageNet"],
    "`EasySet` takes a folder for each class.",
)
