"""Sinusoid regression (Finn et al. 2017, section 5.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmeta import values
from fastmeta.batch import TaskBatch
from fastmeta.tasks._arguments import check_sizes


class SinusoidTasks:
    """Tasks `y = A sin(x - phase)` with A ~ U[0.1, 5], phase ~ U[0, pi] and x ~ U[-5, 5], as the authors' code has it.

    `sample` gives float32 `[T, shots, 1]` inputs and targets for the support set, `[T, query_shots, 1]` for the query.
    """

    kind = "regression"
    input_shape = (1,)
    output_size = 1
    name = "sinusoid"
    amplitude = (0.1, 5.0)
    phase = (0.0, math.pi)
    x_range = (-5.0, 5.0)

    def __init__(self, *, shots: int = 10, query_shots: int = 10, device: str | torch.device = "cpu"):
        check_sizes(shots=shots, query_shots=query_shots)
        self.shots, self.query_shots, self.device = shots, query_shots, values.device("device", device)

    def sample(self, num_tasks: int, *, generator: torch.Generator | None = None) -> TaskBatch:
        """`num_tasks` sinusoids, drawn with `generator` (of the tasks' device) or the global one."""
        return self.sample_part(num_tasks, slice(None), generator=generator)

    def sample_part(self, num_tasks: int, part: slice, *, generator: torch.Generator | None = None) -> TaskBatch:
        """The tasks `part` of the `num_tasks` of `sample`: all are drawn, and the targets of these found."""
        values.count("num_tasks", num_tasks, 0)
        values.generator("generator", generator, self.device)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.empty(shape, device=self.device).uniform_(low, high, generator=generator)

        amplitude, phase = uniform(*self.amplitude, num_tasks, 1, 1), uniform(*self.phase, num_tasks, 1, 1)
        x = uniform(*self.x_range, num_tasks, self.shots + self.query_shots, 1)
        if part != slice(None):
            amplitude, phase, x = amplitude[part], phase[part], x[part]
        y = (x - phase).sin_().mul_(amplitude)
        sizes = (self.shots, self.query_shots)
        (support_x, query_x), (support_y, query_y) = (t.split_with_sizes(sizes, 1) for t in (x, y))
        return TaskBatch(support_x, support_y, query_x, query_y)
