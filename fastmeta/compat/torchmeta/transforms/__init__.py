"""Transforms of targets, of tasks and of classes."""

from fastmeta.compat._absent import not_here
from fastmeta.compat.torchmeta.transforms.augmentations import HorizontalFlip, Rotation, VerticalFlip
from fastmeta.compat.torchmeta.transforms.categorical import Categorical, FixedCategory
from fastmeta.compat.torchmeta.transforms.splitters import ClassSplitter, Splitter, WeightedClassSplitter
from fastmeta.compat.torchmeta.transforms.target_transforms import DefaultTargetTransform, TargetTransform

__all__ = [
    "Categorical",
    "ClassSplitter",
    "DefaultTargetTransform",
    "FixedCategory",
    "HorizontalFlip",
    "Rotation",
    "Splitter",
    "TargetTransform",
    "VerticalFlip",
    "WeightedClassSplitter",
]
__getattr__ = not_here(
    __name__,
    "torchmeta 1.8.0",
    ["NumpyToTorch", "SegmentationPairTransform"],
    "They belong to the tabular and the segmentation data sets, which are not here either.",
)
