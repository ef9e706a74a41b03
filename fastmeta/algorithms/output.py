"""What every algorithm's `forward` returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MetaOutput(NamedTuple):
    """The result of one task batch.

    `loss` is the mean of the query losses over tasks, a differentiable scalar: call `.backward()` on it.
    `task_loss` `[T]` holds the tasks' own losses, `accuracy` `[T]` their query accuracy (None for
    regression), `logits` `[T, Q, C]` the query predictions (None where a fused loss never forms them).
    """

    loss: Tensor
    task_loss: Tensor
    accuracy: Tensor | None = None
    logits: Tensor | None = None
