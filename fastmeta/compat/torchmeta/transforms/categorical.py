"""Classes as numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastmeta.compat.torchmeta.transforms.target_transforms import TargetTransform


class Categorical(TargetTransform):
    """Targets as labels in [0, num_classes), the same target always as the same label.

    Labels are handed out at first sight: in a random order, drawn by torch when the first is needed, or where
    `num_classes` is None (default) counting up from 0.

    Raises:
        IndexError: more targets than `num_classes`.
    """

    def __init__(self, num_classes: int | None = None):
        self.num_classes = num_classes
        self.reset()

    def reset(self) -> None:
        """Forgets the targets and the order."""
        self.classes = {}
        self._labels = None

    @property
    def labels(self) -> list[int] | None:
        if self._labels is None and self.num_classes is not None:
            self._labels = torch.randperm(self.num_classes).tolist()
        return self._labels

    def __call__(self, target) -> int:
        if target not in self.classes:
            known = len(self.classes)
            if self.num_classes is not None and known >= self.num_classes:
                raise IndexError(f"{target!r} is one more than the {self.num_classes} classes of {self!r}")
            self.classes[target] = known if self.num_classes is None else self.labels[known]
        return self.classes[target]

    def __repr__(self):
        return f"{type(self).__name__}({self.num_classes or ''})"


class FixedCategory:
    """`target` -> `(target, transform)`: a class is known by its name and by what it was augmented with."""

    def __init__(self, transform: Callable | None = None):
        self.transform = transform

    def __call__(self, target):
        return target, self.transform

    def __repr__(self):
        return f"{type(self).__name__}({self.transform})"
