"""Data on a device, and tasks taken apart."""

from __future__ import annotations

import torch
from torch.utils.data import TensorDataset

from fastmeta.compat._absent import not_here

from .._partition import partition_task, stack_tasks

__all__ = ["InfiniteIterator", "OnDeviceDataset", "partition_task", "stack_tasks"]

__getattr__ = not_here(__name__, "learn2learn 0.2.0", ("download_file", "download_file_from_google_drive"))


class InfiniteIterator:
    """Iterates over `dataloader` again and again."""

    def __init__(self, dataloader):
        self.dataloader = dataloader
        self.iterator = iter(dataloader)

    def __iter__(self):
        return self

    def __next__(self):
        while True:
            try:
                return next(self.iterator)
            except StopIteration:
                self.iterator = iter(self.dataloader)


class OnDeviceDataset(TensorDataset):
    """All of `dataset` as two tensors on a device.

    Args:
        dataset: pairs of a tensor, all of one shape, and a number.
        device: where they lie; by default where they are. On a CPU beside a GPU they lie in pinned memory.
        transform: applied to a sample when it is asked for; default None.
    """

    def __init__(self, dataset, device=None, transform=None):
        samples, labels = zip(*dataset, strict=True)
        data, labels = torch.stack(samples), torch.tensor(labels)
        if device is not None:
            data, labels = data.to(device), labels.to(device)
        if data.device.type == "cpu" and torch.cuda.is_available():
            data, labels = data.pin_memory(), labels.pin_memory()
        super().__init__(data, labels)
        self.transform = transform
        if hasattr(dataset, "_bookkeeping_path"):
            self._bookkeeping_path = dataset._bookkeeping_path

    def labels_at_once(self) -> list:
        return self.tensors[1].tolist()

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return (x if self.transform is None else self.transform(x)), y
