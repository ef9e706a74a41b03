"""Tasks as batches of indices, for a `DataLoader` over the data set itself."""

from __future__ import annotations

import random

import torch

from .task_dataset import Taskset


class TasksetSampler(torch.utils.data.Sampler):
    """A batch sampler: the indices of each task of `taskset`, in random order unless `shuffle` is False; without end
    where the tasks have none."""

    def __init__(self, taskset: Taskset, shuffle: bool = True):
        self.taskset = taskset
        self.shuffle = shuffle

    def description2indices(self, task_description) -> list[int]:
        return [description.index for description in task_description]

    def __iter__(self):
        taskset = self.taskset
        while taskset.num_tasks == -1:
            yield self.description2indices(taskset.sample_task_description())
        order = list(range(taskset.num_tasks))
        if self.shuffle:
            random.shuffle(order)
        for i in order:
            if i not in taskset.sampled_descriptions:
                taskset.sampled_descriptions[i] = taskset.sample_task_description()
            yield self.description2indices(taskset.sampled_descriptions[i])
