"""Task transforms: each takes a task description and returns one.

A description is a list of `DataDescription`s: an `index` into the data set, and the `transforms` that will make a
sample of it, one after the other. None stands for the whole data set. Draws come from Python's `random`, in the order
in which 0.2.0 makes them: the same seed gives the same tasks.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections import defaultdict

from ._description import DataDescription
from ._rotation import RandomClassRotation

__all__ = [
    "ConsecutiveLabels",
    "FilterLabels",
    "FusedNWaysKShots",
    "KShots",
    "LoadData",
    "NWays",
    "RandomClassRotation",
    "RemapLabels",
    "TaskTransform",
]


class TaskTransform:
    """What transforms share: `dataset`, and the description of all of it."""

    def __init__(self, dataset):
        self.dataset = dataset

    def new_task(self) -> list[DataDescription]:
        return [DataDescription(i) for i in range(len(self.dataset))]


class Loaded:
    """The sample at an index."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __call__(self, index: int):
        return self.dataset[index]


class Numbered:
    """The place of a label in `labels`."""

    def __init__(self, labels: list):
        self.labels = labels

    def __call__(self, label) -> int:
        return self.labels.index(label)


class LoadData(TaskTransform):
    """Samples are `dataset[index]`."""

    def __call__(self, task_description):
        if task_description is None:
            task_description = self.new_task()
        load = Loaded(self.dataset)
        for description in task_description:
            description.transforms.append(load)
        return task_description


class FilterLabels(TaskTransform):
    """Keeps the samples with one of `labels`."""

    def __init__(self, dataset, labels):
        super().__init__(dataset)
        self.labels = labels
        wanted = set(labels)
        self.filtered_indices = [dataset.indices_to_labels[i] in wanted for i in range(len(dataset))]

    def __call__(self, task_description):
        if task_description is None:
            task_description = self.new_task()
        return [description for description in task_description if self.filtered_indices[description.index]]


class ConsecutiveLabels(TaskTransform):
    """Orders the samples by the data set's labels, those of one as they are."""

    def __call__(self, task_description):
        if task_description is None:
            task_description = self.new_task()
        return sorted(task_description, key=lambda d: self.dataset.indices_to_labels[d.index])


class RemapLabels(TaskTransform):
    """Numbers the task's K labels from 0 to K - 1, in random order; with `shuffle=False` in that of a Python set."""

    def __init__(self, dataset, shuffle: bool = True):
        super().__init__(dataset)
        self.shuffle = shuffle

    def remap(self, data, mapping) -> list:
        """The sample `data` with `mapping(label)` for its label."""
        data = list(data)
        data[1] = mapping(data[1])
        return data

    def __call__(self, task_description):
        if task_description is None:
            task_description = self.new_task()
        labels = list({self.dataset.indices_to_labels[d.index] for d in task_description})
        if self.shuffle:
            random.shuffle(labels)
        remap = functools.partial(self.remap, mapping=Numbered(labels))
        for description in task_description:
            description.transforms.append(remap)
        return task_description


class NWays(TaskTransform):
    """Keeps the samples of `n` random labels, 2 by default.

    Raises:
        ValueError: when called, fewer labels than that.
    """

    def __init__(self, dataset, n: int = 2):
        super().__init__(dataset)
        self.n = n
        self.indices_to_labels = dict(dataset.indices_to_labels)

    def new_task(self) -> list[DataDescription]:
        labels = random.sample(self.dataset.labels, k=self.n)
        return [DataDescription(i) for label in labels for i in self.dataset.labels_to_indices[label]]

    def __call__(self, task_description):
        if task_description is None:
            return self.new_task()
        labels = list({self.indices_to_labels[d.index] for d in task_description})
        kept = set(random.sample(labels, k=self.n))
        return [d for d in task_description if self.indices_to_labels[d.index] in kept]


class KShots(TaskTransform):
    """Keeps `k` random samples of each label, 1 by default, in the order of the labels' first samples.

    Args:
        dataset: the `MetaDataset` of the task.
        k: samples of each label.
        replacement: whether a sample may be drawn again; False by default.

    Raises:
        ValueError: when called, a label with fewer samples, without replacement.
    """

    def __init__(self, dataset, k: int = 1, replacement: bool = False):
        super().__init__(dataset)
        self.k = k
        self.replacement = replacement

    def __call__(self, task_description):
        if task_description is None:
            task_description = self.new_task()
        by_label = defaultdict(list)
        for description in task_description:
            by_label[self.dataset.indices_to_labels[description.index]].append(description)
        return list(itertools.chain.from_iterable(map(self._drawn, by_label.values())))

    def _drawn(self, descriptions: list[DataDescription]) -> list[DataDescription]:
        if not self.replacement:
            return random.sample(descriptions, k=self.k)
        # each its own: later transforms write into them
        return [d.copy() for d in random.choices(descriptions, k=self.k)]


class FusedNWaysKShots(TaskTransform):
    """`FilterLabels`, `NWays` and `KShots` in one, which draws indices alone.

    Args:
        dataset: the `MetaDataset` of the task.
        n: labels, 2 by default.
        k: samples of each, 1 by default.
        replacement: whether a sample may be drawn again; False by default.
        filter_labels: labels to draw from; default all.

    Raises:
        ValueError: when called, fewer labels, or samples of one without replacement.
    """

    def __init__(self, dataset, n: int = 2, k: int = 1, replacement: bool = False, filter_labels=None):
        super().__init__(dataset)
        self.n = n
        self.k = k
        self.replacement = replacement
        self.filter_labels = dataset.labels if filter_labels is None else filter_labels
        self.filter = FilterLabels(dataset, self.filter_labels)
        self.nways = NWays(dataset, n)
        self.kshots = KShots(dataset, k=k, replacement=replacement)

    def new_task(self) -> list[DataDescription]:
        drawn = []
        for label in random.sample(self.filter_labels, k=self.n):
            indices = self.dataset.labels_to_indices[label]
            if self.replacement:
                drawn += [random.choice(indices) for _ in range(self.k)]
            else:
                drawn += random.sample(indices, k=self.k)
        return [DataDescription(i) for i in drawn]

    def __call__(self, task_description):
        if task_description is None:
            return self.new_task()
        return self.kshots(self.nways(self.filter(task_description)))
