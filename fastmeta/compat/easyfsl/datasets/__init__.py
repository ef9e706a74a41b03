"""Data sets whose labels can be had without their images."""

from fastmeta.compat._absent import data_not_here
from fastmeta.compat.easyfsl.datasets.cub import CUB
from fastmeta.compat.easyfsl.datasets.easy_set import EasySet
from fastmeta.compat.easyfsl.datasets.features_dataset import FeaturesDataset
from fastmeta.compat.easyfsl.datasets.few_shot_dataset import FewShotDataset
from fastmeta.compat.easyfsl.datasets.support_set_folder import SupportSetFolder
from fastmeta.compat.easyfsl.datasets.tiered_imagenet import TieredImageNet
from fastmeta.compat.easyfsl.datasets.wrap_few_shot_dataset import WrapFewShotDataset

__all__ = [
    "CUB",
    "EasySet",
    "FeaturesDataset",
    "FewShotDataset",
    "SupportSetFolder",
    "TieredImageNet",
    "WrapFewShotDataset",
]
__getattr__ = data_not_here(
    __name__,
    "easyfsl 1.5.0",
    ["DanishFungi", "MiniImageNet"],
    "`EasySet` takes a folder for each class.",
)
