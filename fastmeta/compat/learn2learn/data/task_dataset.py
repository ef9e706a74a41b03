"""Tasks drawn from a data set."""

from __future__ import annotations

import random

from torch.utils.data import default_collate

from fastmeta import TaskBatch

from .._partition import split_tasks, stack_tasks
from ..utils import warn_once
from ._description import DataDescription
from ._gather import gathered
from .meta_dataset import MetaDataset

__all__ = ["DataDescription", "TaskDataset", "Taskset"]


class Taskset:
    """Tasks of a data set, each drawn when it is first asked for.

    A task is a description (see `transforms`) that every task transform has had a hand in; its samples, collated, are
    what `sample()` and indexing return: usually `[data, labels]`.

    Args:
        dataset: what is no `MetaDataset` is made one.
        task_transforms: a list of task transforms, or one callable that makes the whole description; default none.
        num_tasks: that many tasks, whose descriptions are kept, so that task i is the same each time; -1
            (default) for a new one each time, of which `len` says 1.
        task_collate: makes a task of a list of samples; default torch's `default_collate`.

    Tasks whose samples are rows of two tensors are loaded by one indexing, to the same values.

    Raises:
        ValueError: `num_tasks` 0 or below -1.
    """

    def __init__(self, dataset, task_transforms=None, num_tasks: int = -1, task_collate=None):
        if num_tasks < -1 or num_tasks == 0:
            raise ValueError("num_tasks needs to be -1 (infinity) or positive.")
        self.dataset = dataset if isinstance(dataset, MetaDataset) else MetaDataset(dataset)
        self.task_transforms = [] if task_transforms is None else task_transforms
        self.num_tasks = num_tasks
        self.task_collate = default_collate if task_collate is None else task_collate
        self.sampled_descriptions = {}
        self._task_id = 0

    def sample_task_description(self):
        """A new description."""
        if callable(self.task_transforms):
            return self.task_transforms(None)
        description = None
        for transform in self.task_transforms:
            description = transform(description)
        return description

    def get_task(self, task_description):
        """The task that a description describes."""
        task_description = list(task_description)
        if self.task_collate is default_collate:
            found = gathered([task_description])
            if found is not None:
                return [part[0] for part in found]
        samples = []
        for description in task_description:
            data = description.index
            for transform in description.transforms:
                data = transform(data)
            samples.append(data)
        return self.task_collate(samples)

    def sample(self):
        """A random task."""
        return self[random.randint(0, len(self) - 1)]

    def sample_batch(self, num_tasks: int, shots: int = 1) -> TaskBatch:
        """`num_tasks` random tasks, each taken apart by `partition_task`, in one batch; what `sample()` would draw as
        often. Not in learn2learn.

        Returns:
            Support rows `[T, S, ...]`, labels `[T, S]`, query rows `[T, Q, ...]`, labels `[T, Q]`, ordered by label.

        Raises:
            AssertionError: tasks whose labels are not all there equally often, or less often than `shots`.
        """
        if type(self).get_task is Taskset.get_task and self.task_collate is default_collate:
            drawn = [self._description(random.randint(0, len(self) - 1)) for _ in range(num_tasks)]
            found = gathered(drawn) if drawn else None
            if found is not None:
                return split_tasks(*found, shots)
            return stack_tasks([self.get_task(description) for description in drawn], shots)
        return stack_tasks([self.sample() for _ in range(num_tasks)], shots)

    def _description(self, i: int):
        if self.num_tasks == -1:
            return self.sample_task_description()
        if i not in self.sampled_descriptions:
            self.sampled_descriptions[i] = self.sample_task_description()
        return self.sampled_descriptions[i]

    def __len__(self) -> int:
        return 1 if self.num_tasks == -1 else self.num_tasks

    def __getitem__(self, i: int):
        return self.get_task(self._description(i))

    def __iter__(self):
        self._task_id = 0
        return self

    def __next__(self):
        if self.num_tasks != -1 and self._task_id >= self.num_tasks:
            raise StopIteration
        self._task_id += 1
        return self[self._task_id - 1]

    def __add__(self, other):
        raise NotImplementedError("Adding datasets not yet supported for TaskDatasets.")


class TaskDataset(Taskset):
    """`Taskset` under its old name, which warns once."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        warn_once("TaskDataset is deprecated, use Taskset instead.", "deprecation")
