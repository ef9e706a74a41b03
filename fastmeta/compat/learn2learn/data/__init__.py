"""Data sets that know their labels, and tasks drawn from them."""

from . import transforms
from .meta_dataset import FilteredMetaDataset, MetaDataset, UnionMetaDataset
from .task_dataset import DataDescription, TaskDataset, Taskset
from .utils import InfiniteIterator, OnDeviceDataset, partition_task, stack_tasks

__all__ = [
    "DataDescription",
    "FilteredMetaDataset",
    "InfiniteIterator",
    "MetaDataset",
    "OnDeviceDataset",
    "TaskDataset",
    "Taskset",
    "UnionMetaDataset",
    "partition_task",
    "stack_tasks",
    "transforms",
]
