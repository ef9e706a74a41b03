"""Data sets of classes, and of the tasks that are made of several of them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from copy import deepcopy
from itertools import combinations
from math import comb

from fastmeta.compat.torchmeta.compose import Compose, wrap_transform
from fastmeta.compat.torchmeta.transforms.categorical import Categorical, FixedCategory
from fastmeta.compat.torchmeta.transforms.target_transforms import DefaultTargetTransform
from fastmeta.compat.torchmeta.utils.data.meta_dataset import MetaDataset, Split
from fastmeta.compat.torchmeta.utils.data.task import ConcatTask

__all__ = ["ClassDataset", "CombinationMetaDataset", "MetaDataset"]


class ClassDataset(Split):
    """Base of data sets of which each item is the `Dataset` of one class.

    A subclass has `__getitem__` and `num_classes`. Each of the `class_augmentations`, a list of things that yield
    transforms (`transforms.Rotation([90, 180])`), makes as many classes anew of those that there are: class `i` is
    class `i % num_classes`, transformed by augmentation `i // num_classes - 1`.
    """

    def __init__(
        self,
        meta_train: bool = False,
        meta_val: bool = False,
        meta_test: bool = False,
        meta_split: str | None = None,
        class_augmentations: list | None = None,
    ):
        super().__init__(meta_train, meta_val, meta_test, meta_split)
        if class_augmentations is not None and not isinstance(class_augmentations, list):
            raise TypeError(f"`class_augmentations` must be a list, got {type(class_augmentations)}")
        unique = {}
        for augmentation in class_augmentations or []:
            for transform in augmentation:
                if transform in unique:
                    warnings.warn(
                        f"the class augmentation {transform!r} is there already, and makes no classes a second time",
                        UserWarning,
                        stacklevel=2,
                    )
                unique.setdefault(transform)
        self.class_augmentations = list(unique)

    def get_class_augmentation(self, index: int) -> Callable | None:
        number = index // self.num_classes - 1
        return None if number < 0 else self.class_augmentations[number]

    def get_transform(self, index: int, transform: Callable | None = None) -> Callable | None:
        """What an image of class `index` goes through: its augmentation, then `transform`."""
        augmentation = self.get_class_augmentation(index)
        if augmentation is None or transform is None:
            return augmentation or transform
        return Compose([augmentation, transform])

    def get_target_transform(self, index: int) -> FixedCategory:
        return FixedCategory(self.get_class_augmentation(index))

    def __getitem__(self, index: int):
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        raise NotImplementedError

    def __len__(self) -> int:
        return self.num_classes * (len(self.class_augmentations) + 1)


class CombinationMetaDataset(MetaDataset):
    """All tasks of `num_classes_per_task` classes of a `ClassDataset`: its index is a tuple of classes.

    Without a `target_transform` the target of an example is `(label of its class, number of its augmentation)`.
    """

    def __init__(
        self,
        dataset: ClassDataset,
        num_classes_per_task: int,
        target_transform: Callable | None = None,
        dataset_transform: Callable | None = None,
    ):
        if not isinstance(num_classes_per_task, int):
            raise TypeError(f"`num_classes_per_task` must be an int, got {type(num_classes_per_task)}")
        self.dataset = dataset
        self.num_classes_per_task = num_classes_per_task
        if target_transform is None:
            target_transform = DefaultTargetTransform(dataset.class_augmentations)
        super().__init__(
            meta_train=dataset.meta_train,
            meta_val=dataset.meta_val,
            meta_test=dataset.meta_test,
            meta_split=dataset.meta_split,
            target_transform=target_transform,
            dataset_transform=dataset_transform,
        )

    def __iter__(self):
        for index in combinations(range(len(self.dataset)), self.num_classes_per_task):
            yield self[index]

    def sample_task(self):
        return self[tuple(self.np_random.choice(len(self.dataset), size=self.num_classes_per_task, replace=False))]

    def __getitem__(self, index: tuple[int, ...]):
        if isinstance(index, int):
            raise ValueError(
                f"a `CombinationMetaDataset` has tuples of {self.num_classes_per_task} classes as index, got {index}"
            )
        assert len(index) == self.num_classes_per_task
        task = ConcatTask(
            [self.dataset[i] for i in index],
            self.num_classes_per_task,
            target_transform=wrap_transform(self.target_transform, self._of_this_task, transform_type=Categorical),
        )
        return task if self.dataset_transform is None else self.dataset_transform(task)

    def _of_this_task(self, transform: Categorical) -> Categorical:
        """Each task numbers its classes for itself."""
        transform.reset()
        if transform.num_classes is None:
            transform.num_classes = self.num_classes_per_task
        return deepcopy(transform)

    def __len__(self) -> int:
        length = comb(len(self.dataset), self.num_classes_per_task)
        if length > sys.maxsize:
            warnings.warn(
                f"there are C({len(self.dataset)}, {self.num_classes_per_task}) tasks, more than a length can be, "
                "which is the largest integer instead",
                UserWarning,
                stacklevel=2,
            )
        return min(length, sys.maxsize)
