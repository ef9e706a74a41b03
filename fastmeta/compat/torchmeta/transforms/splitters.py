"""Tasks split into support and query sets.

Which examples of a class go where is drawn from the hash of the task, that of the class and `random_state_seed`, so a
task is split the same way each time; in which order, from the splitter's own source of chance, which `seed` begins.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from fastmeta.compat.torchmeta.transforms.utils import apply_wrapper
from fastmeta.compat.torchmeta.utils.data.task import ConcatTask, SubsetTask, Task

__all__ = ["ClassSplitter", "Splitter", "WeightedClassSplitter"]


class Splitter:
    """Base of the splitters. Called with a task it gives an `OrderedDict` of `SubsetTask`s by the names in `splits`.

    A subclass has `get_indices_task` and `get_indices_concattask`, which give each split's rows.
    """

    def __init__(self, splits: Mapping[str, float], random_state_seed: int):
        self.splits = splits
        self.random_state_seed = random_state_seed
        self.seed(random_state_seed)

    def seed(self, seed: int | None) -> None:
        self.np_random = np.random.RandomState(seed=seed)

    def get_indices(self, task: Task) -> Mapping[str, list[int]]:
        if isinstance(task, ConcatTask):
            return self.get_indices_concattask(task)
        if isinstance(task, Task):
            return self.get_indices_task(task)
        raise ValueError(f"the task must be a `ConcatTask` or a `Task`, got {type(task)}")

    def get_indices_task(self, task: Task):
        raise NotImplementedError(f"{type(self).__name__} has no `get_indices_task`")

    def get_indices_concattask(self, task: ConcatTask):
        raise NotImplementedError(f"{type(self).__name__} has no `get_indices_concattask`")

    def _get_class_indices(self, task: Task) -> Mapping[object, Sequence[int]]:
        """The rows of each class, by its target; of a regression all of them."""
        if task.num_classes is None:
            return {"regression": range(len(task))}
        rows = defaultdict(list)
        for index in range(len(task)):
            sample = task[index]
            if not isinstance(sample, tuple) or len(sample) < 2:
                raise ValueError("a task is split by its targets: samples must be tuples with the target at the end")
            rows[sample[-1]].append(index)
        if len(rows) != task.num_classes:
            raise ValueError(f"the task {task} has {len(rows)} classes, and says {task.num_classes}")
        return rows

    def __call__(self, task: Task) -> OrderedDict[str, SubsetTask]:
        indices = self.get_indices(task)
        return OrderedDict((split, SubsetTask(task, indices[split])) for split in self.splits)

    def __len__(self) -> int:
        return len(self.splits)


class _ByClass(Splitter):
    """Splits class by class; a subclass says how many examples of each go where."""

    shuffle: bool

    def _sizes(self, rows: int) -> Mapping[str, int]:
        raise NotImplementedError

    def _check(self, name: str, rows: int) -> None:
        if rows < self._min_samples_per_class:
            raise ValueError(
                f"{name} has {rows} samples, fewer than the {self._min_samples_per_class} of a class that "
                f"{type(self).__name__.rstrip('_')} splits"
            )

    def get_indices_task(self, task):
        classes = self._get_class_indices(task)
        return self._split(task, [(f"class `{name}`", rows, i) for i, (name, rows) in enumerate(classes.items())])

    def get_indices_concattask(self, task):
        classes, first = [], 0
        for dataset in task.datasets:
            rows = range(first, first + len(dataset))
            classes.append((f"class `{dataset.index}`", rows, hash(dataset)))
            first = rows.stop
        return self._split(task, classes)

    def _split(self, task, classes):
        for name, rows, _ in classes:
            self._check(name, len(rows))
        indices = OrderedDict((split, []) for split in self.splits)
        numbers = self._counted([len(rows) for _, rows, _ in classes])
        for number, (_, rows, hashed) in zip(numbers, classes, strict=True):
            if self.shuffle:
                seed = (hash(task) + hashed + self.random_state_seed) % 2**32
                order = np.random.RandomState(seed).permutation(number)
            else:
                order = np.arange(number)
            start = 0
            for split, size in self._sizes(number).items():
                part = order[start : start + size]
                if self.shuffle:
                    self.np_random.shuffle(part)
                indices[split] += [rows[i] for i in part]
                start += size
        return indices

    def _counted(self, rows: Sequence[int]) -> Iterator[int]:
        """How many examples of each class count."""
        return rows


class ClassSplitter_(_ByClass):
    """A fixed number of examples of each class for each split: see `ClassSplitter`."""

    def __init__(
        self,
        shuffle: bool = True,
        num_samples_per_class: Mapping[str, int] | None = None,
        num_train_per_class: int | None = None,
        num_test_per_class: int | None = None,
        num_support_per_class: int | None = None,
        num_query_per_class: int | None = None,
        random_state_seed: int = 0,
    ):
        self.shuffle = shuffle
        if num_samples_per_class is None:
            num_samples_per_class = _named(
                ("train", num_train_per_class, "support", num_support_per_class),
                ("test", num_test_per_class, "query", num_query_per_class),
            )
        assert len(num_samples_per_class) > 0
        self._min_samples_per_class = sum(num_samples_per_class.values())
        super().__init__(num_samples_per_class, random_state_seed)

    def _sizes(self, rows):
        return self.splits


class WeightedClassSplitter_(_ByClass):
    """A part of each class for each split: see `WeightedClassSplitter`."""

    def __init__(
        self,
        shuffle: bool = True,
        min_num_samples: int | Mapping[str, int] | None = 1,
        max_num_samples: int | Mapping[str, int] | None = None,
        weights: Mapping[str, float] | None = None,
        train_weights: float | None = None,
        test_weights: float | None = None,
        support_weights: float | None = None,
        query_weights: float | None = None,
        force_equal_per_class: bool = False,
        random_state_seed: int = 0,
    ):
        self.shuffle = shuffle
        self.force_equal_per_class = force_equal_per_class
        if weights is None:
            weights = _named(
                ("train", train_weights, "support", support_weights), ("test", test_weights, "query", query_weights)
            )
        assert len(weights) > 0
        assert sum(weights.values()) <= 1.0
        self.min_num_samples = _of_each("min_num_samples", min_num_samples or 0, weights)
        self.max_num_samples = None
        if max_num_samples is not None:
            self.max_num_samples = _of_each("max_num_samples", max_num_samples, weights)
        self._min_samples_per_class = sum(self.min_num_samples.values())
        super().__init__(weights, random_state_seed)

    def _sizes(self, rows):
        sizes = {split: max(self.min_num_samples[split], int(weight * rows)) for split, weight in self.splits.items()}
        if self.max_num_samples is not None:
            sizes = {split: min(self.max_num_samples[split], size) for split, size in sizes.items()}
        return sizes

    def _counted(self, rows):
        return [min(rows)] * len(rows) if self.force_equal_per_class else rows


def _named(*pairs) -> OrderedDict:
    """Of each pair of names the first that has a number."""
    chosen = OrderedDict()
    for first, number, second, other in pairs:
        if number is not None:
            chosen[first] = number
        elif other is not None:
            chosen[second] = other
    return chosen


def _of_each(name: str, value: int | Mapping[str, int], splits: Mapping[str, float]) -> OrderedDict[str, int]:
    if isinstance(value, int):
        return OrderedDict((split, value) for split in splits)
    if isinstance(value, Mapping):
        return OrderedDict(value)
    raise NotImplementedError(f"`{name}` must be an int or a dict, got {type(value)}")


def ClassSplitter(task=None, *args, **kwargs):
    """Splits tasks into sets with a fixed number of examples of each class.

    Args:
        task: a `MetaDataset`, whose tasks will be split; a `Task`, which is; None (default) for the transform itself.
        shuffle: draw the examples (default True), else take the first.
        num_samples_per_class: a dict of numbers by the splits' names, in place of the next four.
        num_train_per_class, num_test_per_class: the numbers of the splits "train" and "test".
        num_support_per_class, num_query_per_class: of "support" and "query", where those are None.
        random_state_seed: default 0.

    Raises:
        ValueError: on splitting a task: a class with fewer examples than that.
    """
    return apply_wrapper(ClassSplitter_(*args, **kwargs), task)


def WeightedClassSplitter(task=None, *args, **kwargs):
    """Splits tasks into sets with a part of each class's examples.

    Args:
        task: as in `ClassSplitter`, as are `shuffle`, `random_state_seed` and the errors.
        min_num_samples, max_num_samples: bounds of the number of a class's examples, for all splits or by their names;
            default 1 and none.
        weights: a dict of parts, 1 together or less, by the splits' names, in place of the next four.
        train_weights, test_weights, support_weights, query_weights: the parts, as the numbers of `ClassSplitter`.
        force_equal_per_class: take as many of each class as the smallest allows (default False).
    """
    return apply_wrapper(WeightedClassSplitter_(*args, **kwargs), task)
