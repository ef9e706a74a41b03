"""A task is a data set of examples; its `index` says which it is, and is its hash."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch.utils.data import ConcatDataset, Subset
from torch.utils.data import Dataset as TorchDataset

from fastmeta.compat.torchmeta.compose import Compose

__all__ = ["ConcatTask", "Dataset", "SubsetTask", "Task"]


class Dataset(TorchDataset):
    """The examples of one class, `(input, target)` each."""

    def __init__(self, index, transform: Callable | None = None, target_transform: Callable | None = None):
        self.index = index
        self.transform = transform
        self.target_transform = target_transform

    def target_transform_append(self, transform: Callable | None) -> None:
        """Puts `transform` behind the `target_transform`."""
        if transform is None:
            return
        if self.target_transform is None:
            self.target_transform = transform
        else:
            self.target_transform = Compose([self.target_transform, transform])

    def __hash__(self):
        return hash(self.index)


class Task(Dataset):
    """The examples of one task of `num_classes` classes, or None for a regression."""

    def __init__(
        self,
        index,
        num_classes: int | None,
        transform: Callable | None = None,
        target_transform: Callable | None = None,
    ):
        super().__init__(index, transform=transform, target_transform=target_transform)
        self.num_classes = num_classes


class ConcatTask(Task, ConcatDataset):
    """The classes of a task, each a `Dataset`; `target_transform` goes behind the one of each."""

    def __init__(self, datasets: Sequence[Dataset], num_classes: int, target_transform: Callable | None = None):
        Task.__init__(self, tuple(dataset.index for dataset in datasets), num_classes)
        ConcatDataset.__init__(self, datasets)
        for dataset in self.datasets:
            dataset.target_transform_append(target_transform)

    def __getitem__(self, index):
        return ConcatDataset.__getitem__(self, index)


class SubsetTask(Task, Subset):
    """Some examples of a task, by `indices`."""

    def __init__(
        self,
        dataset: Task,
        indices: Sequence[int],
        num_classes: int | None = None,
        target_transform: Callable | None = None,
    ):
        Task.__init__(self, dataset.index, dataset.num_classes if num_classes is None else num_classes)
        Subset.__init__(self, dataset, indices)
        self.dataset.target_transform_append(target_transform)

    def __getitem__(self, index):
        return Subset.__getitem__(self, index)

    def __getitems__(self, indices):
        return [self[index] for index in indices]  # what a subclass makes of `__getitem__`

    def __hash__(self):
        return hash((self.index, tuple(self.indices)))
