"""How a transform gets to where it is applied."""

from __future__ import annotations

from collections.abc import Callable

from fastmeta.compat.torchmeta.compose import Compose, wrap_transform
from fastmeta.compat.torchmeta.utils.data.meta_dataset import MetaDataset
from fastmeta.compat.torchmeta.utils.data.task import Task

__all__ = ["apply_wrapper", "wrap_transform"]


def apply_wrapper(wrapper: Callable, task_or_dataset=None):
    """`wrapper` itself, a task transformed by it, or a `MetaDataset` whose tasks will be, behind other transforms."""
    if task_or_dataset is None:
        return wrapper
    if isinstance(task_or_dataset, Task):
        return wrapper(task_or_dataset)
    if isinstance(task_or_dataset, MetaDataset):
        first = task_or_dataset.dataset_transform
        task_or_dataset.dataset_transform = wrapper if first is None else Compose([first, wrapper])
        return task_or_dataset
    raise NotImplementedError(f"a `Task` or a `MetaDataset` can be split, got {type(task_or_dataset)}")
