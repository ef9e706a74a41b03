"""Sums of two sine waves (Lacoste et al. 2018, "Uncertainty in Multitask Transfer Learning")."""

from __future__ import annotations

import numpy as np

from fastmeta.compat.torchmeta.toy.functions import FunctionDataset, FunctionTask


class Harmonic(FunctionDataset):
    """`a1 sin(f x + b1) + a2 sin(2 f x + b2)`: frequencies in [5, 7], phases in [0, 2 pi], uniform, amplitudes normal;
    x normal of deviation 1 about the task's domain, uniform in [-4, 4]. See `functions.FunctionDataset`."""

    def __init__(
        self,
        num_samples_per_task,
        num_tasks=5000,
        noise_std=None,
        transform=None,
        target_transform=None,
        dataset_transform=None,
    ):
        super().__init__(num_samples_per_task, num_tasks, noise_std, transform, target_transform, dataset_transform)

    @property
    def domains(self) -> np.ndarray:
        return self._uniform("domains", -4.0, 4.0)

    @property
    def frequencies(self) -> np.ndarray:
        return self._uniform("frequencies", 5.0, 7.0)

    @property
    def phases(self) -> np.ndarray:
        return self._uniform("phases", 0, 2 * np.pi, 2)

    @property
    def amplitudes(self) -> np.ndarray:
        return self._once("amplitudes", lambda: self.np_random.randn(self.num_tasks, 2))

    def _task(self, index):
        numbers = (self.domains[index], self.frequencies[index], self.phases[index], self.amplitudes[index])
        return self._function(HarmonicTask, index, *numbers)


class HarmonicTask(FunctionTask):
    """One sum of two sine waves."""

    def __init__(
        self,
        index,
        domain,
        frequency,
        phases,
        amplitudes,
        noise_std,
        num_samples,
        transform=None,
        target_transform=None,
        np_random=None,
    ):
        np_random = np.random.RandomState(None) if np_random is None else np_random
        self.domain = domain
        self.frequency = frequency
        self.phases = phases
        self.amplitudes = amplitudes

        def values(x):
            first, second = (order * frequency * x + phases[order - 1] for order in (1, 2))
            return amplitudes[0] * np.sin(first) + amplitudes[1] * np.sin(second)

        inputs = domain + np_random.randn(num_samples, 1)
        super().__init__(index, inputs, values, noise_std, transform, target_transform, np_random)
