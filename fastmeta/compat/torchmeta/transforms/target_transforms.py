"""Transforms of targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastmeta.compat._absent import not_here

__getattr__ = not_here(__name__, "torchmeta 1.8.0", ["SegmentationPairTransform"])


class TargetTransform:
    """Base of the transforms of targets."""

    def __call__(self, target):
        raise NotImplementedError

    def __repr__(self):
        return type(self).__name__


class DefaultTargetTransform(TargetTransform):
    """`(label, augmentation)` -> `(label, number)`: 0 for none, else the place among `class_augmentations` from 1."""

    def __init__(self, class_augmentations: Sequence[Callable]):
        self.class_augmentations = class_augmentations
        self._numbers = {augmentation: number for number, augmentation in enumerate(class_augmentations, 1)}
        self._numbers[None] = 0

    def __call__(self, target):
        assert isinstance(target, tuple) and len(target) == 2
        label, augmentation = target
        return label, self._numbers[augmentation]
