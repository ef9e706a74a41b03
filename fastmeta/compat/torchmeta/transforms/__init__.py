"""Transforms of targets, of tasks and of classes."""

from fastmeta.compat._absent import not_here
from fastmeta.compat.torchmeta.transforms.augmentations import HorizontalFlip, Rotation, VerticalFlip
from fastmeta.compat.torchmeta.transforms.categorical import Categorical, FixedCategory
from fastmeta.compat.torchmeta.transforms.splitters import ClassSplitter, Splitter, WeightedClassSplitter
from fastmeta.compat.torchmeta.transforms.tabular_transforms import NumpyToTorch
from fastmeta.compat.torchmeta.transforms.target_transforms import DefaultTargetTransform, TargetTransform

__all__ = [
    "Categorical",
    "ClassSplitter",
    "DefaultTargetTransform",
    "FixedCategory",
    "HorizontalFlip",
    "NumpyToTorch",
    "Rotation",
    "Splitter",
    "TargetTransform",
    "VerticalFlip",
    "WeightedClassSplitter",
]
__getattr__ = not_here(
    __name__,
    "torchmeta 1.8.0",
    ["SegmentationPairTransform"],
    "It belongs to the segmentation data set, which is not here either.",
)
