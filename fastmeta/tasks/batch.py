"""What a sampler returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TaskBatch(NamedTuple):
    """`T` tasks: inputs `[T, S, ...]` and `[T, Q, ...]`, targets int64 labels `[T, S]` or values `[T, S, O]`."""

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    @property
    def num_tasks(self) -> int:
        return self.support_x.shape[0]

    def to(self, *args, **kwargs) -> TaskBatch:
        """Move every tensor, as `Tensor.to` with a device."""
        return TaskBatch(*(tensor.to(*args, **kwargs) for tensor in self))
