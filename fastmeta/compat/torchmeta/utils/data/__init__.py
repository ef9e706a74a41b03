"""Tasks, data sets of tasks, and loaders that make batches of tasks."""

from fastmeta.compat.torchmeta.utils.data.dataloader import BatchMetaDataLoader, MetaDataLoader
from fastmeta.compat.torchmeta.utils.data.dataset import ClassDataset, CombinationMetaDataset, MetaDataset
from fastmeta.compat.torchmeta.utils.data.sampler import CombinationRandomSampler, CombinationSequentialSampler
from fastmeta.compat.torchmeta.utils.data.task import ConcatTask, Dataset, SubsetTask, Task
from fastmeta.compat.torchmeta.utils.data.wrappers import NonEpisodicWrapper

__all__ = [
    "BatchMetaDataLoader",
    "ClassDataset",
    "CombinationMetaDataset",
    "CombinationRandomSampler",
    "CombinationSequentialSampler",
    "ConcatTask",
    "Dataset",
    "MetaDataLoader",
    "MetaDataset",
    "NonEpisodicWrapper",
    "SubsetTask",
    "Task",
]
