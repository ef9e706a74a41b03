"""Which combinations of classes a loader takes."""

from __future__ import annotations

import random
import warnings
from itertools import combinations

from torch.utils.data.sampler import RandomSampler, SequentialSampler

from fastmeta.compat.torchmeta.utils.data.dataset import CombinationMetaDataset

__all__ = ["CombinationRandomSampler", "CombinationSequentialSampler"]


def _check(data_source) -> None:
    if not isinstance(data_source, CombinationMetaDataset):
        raise TypeError(f"`data_source` must be a `CombinationMetaDataset`, got {type(data_source)}")


class CombinationSequentialSampler(SequentialSampler):
    """All combinations in order."""

    def __init__(self, data_source: CombinationMetaDataset):
        _check(data_source)
        super().__init__(data_source)

    def __iter__(self):
        return combinations(range(len(self.data_source.dataset)), self.data_source.num_classes_per_task)


class CombinationRandomSampler(RandomSampler):
    """As many combinations as there are, each drawn from Python's `random`."""

    def __init__(self, data_source: CombinationMetaDataset):
        _check(data_source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a length that no loader looks at
            super().__init__(data_source, replacement=True)

    def __iter__(self):
        classes, ways = range(len(self.data_source.dataset)), self.data_source.num_classes_per_task
        for _ in combinations(classes, ways):
            yield tuple(random.sample(classes, ways))
