"""What a `loss` argument may be."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ._custom_loss import CustomLoss
from ._losses import NAMED, Loss
from ._torch_losses import of_torch


def as_loss(loss: str | Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """A loss object of that name or for that callable; anything else, and one of torch's with `reduction="none"`,
    raises ValueError."""
    if isinstance(loss, str) and loss in NAMED:
        return NAMED[loss]()
    if callable(loss):
        return of_torch(loss) or CustomLoss(loss)
    raise ValueError(f"loss must be one of {', '.join(NAMED)}, or a callable(prediction, target), got {loss!r}")
