"""What the toy problems share: a data set that draws each kind of number for all tasks when it first needs one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastmeta.compat.torchmeta.utils.data import MetaDataset, Task


class FunctionTask(Task):
    """Inputs and values of a function, both NumPy arrays `[num_samples, 1]`; an example is `(input [1], target [1])`.

    `values` maps inputs to targets, before noise of the deviation `noise_std` (None for none).
    """

    def __init__(
        self,
        index: int,
        inputs: np.ndarray,
        values: Callable[[np.ndarray], np.ndarray],
        noise_std: float | None,
        transform: Callable | None,
        target_transform: Callable | None,
        np_random: np.random.RandomState,
    ):
        super().__init__(index, None, transform=transform, target_transform=target_transform)
        self.num_samples = len(inputs)
        self.noise_std = noise_std
        self._inputs = inputs
        self._targets = values(inputs)
        if noise_std is not None and noise_std > 0.0:
            self._targets += noise_std * np_random.randn(self.num_samples, 1)

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        value, target = self._inputs[index], self._targets[index]
        if self.transform is not None:
            value = self.transform(value)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return value, target


class FunctionDataset(MetaDataset):
    """Base of the toy problems: `num_tasks` tasks of `num_samples_per_task` examples. A subclass has `_task`.

    `transform` and `target_transform` take arrays `[1]`, `dataset_transform` a task (`transforms.ClassSplitter`).
    """

    def __init__(
        self,
        num_samples_per_task: int,
        num_tasks: int,
        noise_std: float | None = None,
        transform: Callable | None = None,
        target_transform: Callable | None = None,
        dataset_transform: Callable | None = None,
    ):
        super().__init__(
            meta_split="train", target_transform=target_transform, dataset_transform=dataset_transform
        )
        self.num_samples_per_task = num_samples_per_task
        self.num_tasks = num_tasks
        self.noise_std = noise_std
        self.transform = transform
        self._drawn = {}

    def _once(self, name: str, draw: Callable[[], np.ndarray]) -> np.ndarray:
        """What `draw` gave when `name` was first asked for; `seed` does not draw it anew."""
        if name not in self._drawn:
            self._drawn[name] = draw()
        return self._drawn[name]

    def _uniform(self, name: str, low: float, high: float, *size: int) -> np.ndarray:
        return self._once(name, lambda: self.np_random.uniform(low, high, size=(self.num_tasks, *size)))

    def _task(self, index: int) -> Task:
        raise NotImplementedError

    def _function(self, task_type: type, index: int, *numbers) -> Task:
        return task_type(
            index,
            *numbers,
            self.noise_std,
            self.num_samples_per_task,
            self.transform,
            self.target_transform,
            np_random=self.np_random,
        )

    def __len__(self):
        return self.num_tasks

    def __getitem__(self, index):
        task = self._task(index)
        return task if self.dataset_transform is None else self.dataset_transform(task)
