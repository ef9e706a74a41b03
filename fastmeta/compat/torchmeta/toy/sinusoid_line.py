"""Sinusoids and lines (Finn, Xu, Levine 2018, "Probabilistic Model-Agnostic Meta-Learning")."""

from __future__ import annotations

import numpy as np

from fastmeta.compat.torchmeta.toy.functions import FunctionTask
from fastmeta.compat.torchmeta.toy.sinusoid import Sinusoid


class SinusoidAndLine(Sinusoid):
    """Half of the tasks sinusoids, as in `Sinusoid`, half lines, `intercept + slope * x`, both in [-3, 3] and uniform;
    see `functions.FunctionDataset`."""

    @property
    def slopes(self) -> np.ndarray:
        return self._uniform("slopes", -3.0, 3.0)

    @property
    def intercepts(self) -> np.ndarray:
        return self._uniform("intercepts", -3.0, 3.0)

    @property
    def is_sinusoid(self) -> np.ndarray:
        return self._once("is_sinusoid", self._shuffled_halves)

    def _shuffled_halves(self) -> np.ndarray:
        halves = np.arange(self.num_tasks) >= self.num_tasks // 2
        self.np_random.shuffle(halves)
        return halves

    def _task(self, index):
        if self.is_sinusoid[index]:
            return super()._task(index)
        return self._function(LinearTask, index, self.slopes[index], self.intercepts[index], self._input_range)


class LinearTask(FunctionTask):
    """One line."""

    def __init__(
        self,
        index,
        slope,
        intercept,
        input_range,
        noise_std,
        num_samples,
        transform=None,
        target_transform=None,
        np_random=None,
    ):
        np_random = np.random.RandomState(None) if np_random is None else np_random
        self.slope = slope
        self.intercept = intercept
        self.input_range = input_range
        inputs = np_random.uniform(input_range[0], input_range[1], size=(num_samples, 1))
        super().__init__(
            index, inputs, lambda x: intercept + slope * x, noise_std, transform, target_transform, np_random
        )
