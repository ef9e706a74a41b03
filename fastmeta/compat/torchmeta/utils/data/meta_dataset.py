"""What the data sets of classes and of tasks share, and `MetaDataset`, the base of those of tasks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SPLITS = ("train", "val", "test")


class Split:
    """One of the meta-splits, said by a flag or by its name."""

    def __init__(self, meta_train: bool, meta_val: bool, meta_test: bool, meta_split: str | None):
        flags = dict(zip(SPLITS, (meta_train, meta_val, meta_test), strict=True))
        chosen = sum(map(bool, flags.values()))
        if chosen > 1:
            raise ValueError("only one of `meta_train`, `meta_val` and `meta_test` may be True")
        if chosen == 0:
            if meta_split is None:
                raise ValueError(
                    "which meta-split? say `meta_train=True` (or `meta_val`, `meta_test`) or `meta_split='train'` (or "
                    "'val', 'test')"
                )
            if meta_split not in SPLITS:
                raise ValueError(f"unknown meta-split {meta_split!r}: `meta_split` must be in {list(SPLITS)}")
            flags = {name: name == meta_split for name in SPLITS}
        self.meta_train, self.meta_val, self.meta_test = flags.values()
        self._meta_split = meta_split

    @property
    def meta_split(self) -> str:
        if self._meta_split is None:
            self._meta_split = next(name for name in SPLITS if getattr(self, f"meta_{name}"))
        return self._meta_split


class MetaDataset(Split):
    """Base of data sets of which each item is a task.

    A subclass has `__getitem__` and `__len__`. `np_random` is its source of chance; `seed` begins it anew, and that of
    the `dataset_transform`, which is applied to each task (`transforms.ClassSplitter`).
    """

    def __init__(
        self,
        meta_train: bool = False,
        meta_val: bool = False,
        meta_test: bool = False,
        meta_split: str | None = None,
        target_transform: Callable | None = None,
        dataset_transform: Callable | None = None,
    ):
        super().__init__(meta_train, meta_val, meta_test, meta_split)
        self.target_transform = target_transform
        self.dataset_transform = dataset_transform
        self.seed()

    def seed(self, seed: int | None = None) -> None:
        self.np_random = np.random.RandomState(seed=seed)
        _seed_transform(self.dataset_transform, seed)

    def __iter__(self):
        for index in range(len(self)):
            yield self[index]

    def sample_task(self):
        return self[self.np_random.randint(len(self))]

    def __getitem__(self, index):
        raise NotImplementedError

    def __len__(self):
        raise NotImplementedError


def _seed_transform(transform, seed: int | None) -> None:
    if hasattr(transform, "transforms"):
        for part in transform.transforms:
            _seed_transform(part, seed)
    elif hasattr(transform, "seed"):
        transform.seed(seed=seed)
