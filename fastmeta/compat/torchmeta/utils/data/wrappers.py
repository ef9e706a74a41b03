"""Examples one by one, for training that knows no tasks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch.utils.data import Dataset

from fastmeta.compat.torchmeta.utils.data.dataset import CombinationMetaDataset

__all__ = ["NonEpisodicWrapper"]


class NonEpisodicWrapper(Dataset):
    """All examples of a `CombinationMetaDataset`, the augmented ones too: `(input, (label, augmentation))`.

    `augmentation` is 0 for none, else its number from 1; `target_transform` takes this pair.
    """

    def __init__(self, dataset: CombinationMetaDataset, target_transform: Callable | None = None):
        if not isinstance(dataset, CombinationMetaDataset):
            raise ValueError(f"only a `CombinationMetaDataset` can be taken apart, got {type(dataset)}")
        self.dataset = dataset
        self.target_transform = target_transform
        classes = dataset.dataset
        self._ends = np.cumsum([len(classes[index]) for index in range(classes.num_classes)])

    @property
    def num_samples(self) -> int:
        """Examples without augmentation."""
        return int(self._ends[-1])

    @property
    def num_classes(self) -> int:
        return len(self.dataset.dataset)

    def __len__(self):
        return self.num_samples * (len(self.dataset.dataset.class_augmentations) + 1)

    def __getitem__(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} examples")
        augmentation, row = divmod(index % len(self), self.num_samples)
        number = int(np.searchsorted(self._ends, row, side="right"))
        first = int(self._ends[number - 1]) if number else 0
        classes = self.dataset.dataset
        image, (label, _) = classes[augmentation * classes.num_classes + number][row - first]
        target = (label, augmentation)
        return image, target if self.target_transform is None else self.target_transform(target)
