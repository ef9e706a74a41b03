"""Loaders whose items are tasks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data.dataloader import default_collate

from fastmeta.compat.torchmeta.utils.data.dataset import CombinationMetaDataset
from fastmeta.compat.torchmeta.utils.data.sampler import CombinationRandomSampler, CombinationSequentialSampler

__all__ = ["BatchMetaCollate", "BatchMetaDataLoader", "MetaDataLoader", "no_collate"]


class BatchMetaCollate:
    """The examples of each task as one batch, and these batches as one: `[T, S, ...]`."""

    def __init__(self, collate_fn: Callable):
        self.collate_fn = collate_fn

    def collate_task(self, task):
        if isinstance(task, TorchDataset):
            return self.collate_fn([task[index] for index in range(len(task))])
        if isinstance(task, OrderedDict):
            return OrderedDict((name, self.collate_task(part)) for name, part in task.items())
        raise NotImplementedError(f"a task must be a data set or an OrderedDict of data sets, got {type(task)}")

    def __call__(self, batch):
        return self.collate_fn([self.collate_task(task) for task in batch])


def no_collate(batch):
    return batch


class MetaDataLoader(DataLoader):
    """`torch.utils.data.DataLoader` whose batches are lists of tasks, shuffled by default."""

    def __init__(
        self,
        dataset,
        batch_size: int = 1,
        shuffle: bool = True,
        sampler=None,
        batch_sampler=None,
        num_workers: int = 0,
        collate_fn: Callable | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable | None = None,
    ):
        if isinstance(dataset, CombinationMetaDataset) and sampler is None:
            sampler = CombinationRandomSampler(dataset) if shuffle else CombinationSequentialSampler(dataset)
            shuffle = False
        super().__init__(
            dataset,
            batch_size=batch_size,
            shuffle=shuffle,
            sampler=sampler,
            batch_sampler=batch_sampler,
            num_workers=num_workers,
            collate_fn=no_collate if collate_fn is None else collate_fn,
            pin_memory=pin_memory,
            drop_last=drop_last,
            timeout=timeout,
            worker_init_fn=worker_init_fn,
        )


class BatchMetaDataLoader(MetaDataLoader):
    """Batches of tasks as tensors: `inputs, targets`, or a dict of these by split ("train", "test"), `[T, S, ...]`."""

    def __init__(
        self,
        dataset,
        batch_size: int = 1,
        shuffle: bool = True,
        sampler=None,
        num_workers: int = 0,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable | None = None,
    ):
        super().__init__(
            dataset,
            batch_size=batch_size,
            shuffle=shuffle,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=BatchMetaCollate(default_collate),
            pin_memory=pin_memory,
            drop_last=drop_last,
            timeout=timeout,
            worker_init_fn=worker_init_fn,
        )
