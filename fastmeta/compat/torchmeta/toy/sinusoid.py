"""Sinusoids (Finn et al. 2017)."""

from __future__ import annotations

import numpy as np

from fastmeta.compat.torchmeta.toy.functions import FunctionDataset, FunctionTask


class Sinusoid(FunctionDataset):
    """`amplitude * sin(x - phase)`: amplitudes in [0.1, 5], phases in [0, pi], x in [-5, 5], all uniform; see
    `functions.FunctionDataset`."""

    def __init__(
        self,
        num_samples_per_task,
        num_tasks=1000000,
        noise_std=None,
        transform=None,
        target_transform=None,
        dataset_transform=None,
    ):
        super().__init__(num_samples_per_task, num_tasks, noise_std, transform, target_transform, dataset_transform)
        self._input_range = np.array([-5.0, 5.0])

    @property
    def amplitudes(self) -> np.ndarray:
        return self._uniform("amplitudes", 0.1, 5.0)

    @property
    def phases(self) -> np.ndarray:
        return self._uniform("phases", 0, np.pi)

    def _task(self, index):
        return self._function(SinusoidTask, index, self.amplitudes[index], self.phases[index], self._input_range)


class SinusoidTask(FunctionTask):
    """One sinusoid."""

    def __init__(
        self,
        index,
        amplitude,
        phase,
        input_range,
        noise_std,
        num_samples,
        transform=None,
        target_transform=None,
        np_random=None,
    ):
        np_random = np.random.RandomState(None) if np_random is None else np_random
        self.amplitude = amplitude
        self.phase = phase
        self.input_range = input_range
        inputs = np_random.uniform(input_range[0], input_range[1], size=(num_samples, 1))
        super().__init__(
            index, inputs, lambda x: amplitude * np.sin(x - phase), noise_std, transform, target_transform, np_random
        )
