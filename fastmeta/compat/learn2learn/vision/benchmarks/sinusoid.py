"""Sinusoids as tasks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta import TaskBatch
from fastmeta.tasks import SinusoidTasks

from ...data.task_dataset import Taskset


class SinusoidTaskset(Taskset):
    """Tasks `(x [B, 1], y [B, 1])`: points of a sine wave of random amplitude in [0.1, 5] and phase in [0, pi].

    Args:
        samples: B.
        num_tasks: as in `Taskset`.
        device: where they are drawn.
    """

    def __init__(self, samples: int, num_tasks: int = -1, device=None):
        super().__init__(torch.utils.data.TensorDataset(torch.empty(0), torch.empty(0)), num_tasks=num_tasks)
        self.source = SinusoidTasks(shots=samples, query_shots=1, device="cpu" if device is None else device)

    def sample_task_description(self) -> tuple[Tensor, Tensor]:
        x, y, *_ = self.source.sample(1)
        return x[0], y[0]

    def get_task(self, task_description) -> list[Tensor]:
        return list(task_description)

    def sample_batch(self, num_tasks: int, shots: int = 1) -> TaskBatch:
        """`num_tasks` random tasks whose first `shots` points are the support rows."""
        x, y = (torch.stack(part) for part in zip(*(self.sample() for _ in range(num_tasks)), strict=True))
        return TaskBatch(x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:])
