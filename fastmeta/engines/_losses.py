"""The losses an engine knows: per-task values, and the gradient at the prediction, itself differentiable.

`cross_entropy` and `mse` are means over the rows (and columns) of one task, as in `torch.nn.functional`; their
gradients are formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmeta import _checks

from ._exact import gradients_per_task


class RowLoss:
    """A loss that is a mean over rows."""

    in_kernels: str | None = None  # its name in the fused inner loops

    def kernel_targets(self, target: Tensor) -> Tensor:
        return target


class CrossEntropy(RowLoss):
    """Mean negative log-likelihood of softmax. Predictions `[T, B, C]`, labels int64 `[T, B]`."""

    name = "cross_entropy"
    in_kernels = name
    # torch's default ignores rows labelled -100, a label like any other out of range here: let it be refused
    one_task = staticmethod(partial(F.cross_entropy, ignore_index=-(2**62)))

    def check(self, prediction: Tensor, target: Tensor, name: str) -> None:
        if target.dtype != torch.int64 or target.shape != prediction.shape[:-1]:
            raise ValueError(
                f"{name}: cross_entropy takes int64 labels of shape {tuple(prediction.shape[:-1])}, "
                f"got {target.dtype} of shape {tuple(target.shape)}"
            )
        if not (torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling()):
            _checks.label_range(name, target, prediction.shape[-1])

    def per_task(self, prediction: Tensor, target: Tensor) -> Tensor:
        rows = F.cross_entropy(prediction.flatten(0, 1), target.flatten(), reduction="none")
        return rows.view(target.shape).mean(1)

    def constant(self, target: Tensor, prediction: Tensor) -> Tensor:
        """The part of the gradient that stays the same in all inner steps: minus the one-hot labels over B."""
        return torch.zeros_like(prediction).scatter_(-1, target.unsqueeze(-1), -1.0 / max(target.shape[1], 1))

    def gradient(self, prediction: Tensor, constant: Tensor) -> Tensor:
        return torch.add(constant, torch.softmax(prediction, -1), alpha=1.0 / max(prediction.shape[1], 1))


class MeanSquaredError(RowLoss):
    """Mean of squared differences. Predictions and targets `[T, B, O]`."""

    name = "mse"
    in_kernels = name
    one_task = staticmethod(F.mse_loss)

    def check(self, prediction: Tensor, target: Tensor, name: str) -> None:
        # F.mse_loss broadcasts [B] against [B, 1] to [B, B] with a mere warning: refused here.
        if target.shape != prediction.shape or not target.is_floating_point():
            raise ValueError(
                f"{name}: mse takes floating-point targets of the prediction's shape {tuple(prediction.shape)}, "
                f"got {target.dtype} of shape {tuple(target.shape)}"
            )

    def per_task(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).square().flatten(1).mean(1)

    def constant(self, target: Tensor, prediction: Tensor) -> Tensor:
        return target

    def gradient(self, prediction: Tensor, constant: Tensor) -> Tensor:
        per_task = prediction[0].numel() if prediction.shape[0] else 1
        return (prediction - constant) * (2.0 / max(per_task, 1))


class CustomLoss:
    """A callable `(prediction, target) -> scalar` for one task, batched over tasks by `torch.func.vmap`.

    One that the fused inner loops know too has an attribute `in_kernels`, its name there, and a method `kernel_targets`
    that turns all tasks' targets `[T, B, ...]` into theirs.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]):
        self.one_task = function
        self.name = getattr(function, "__name__", type(function).__name__)
        self.in_kernels: str | None = getattr(function, "in_kernels", None)

    def kernel_targets(self, target: Tensor) -> Tensor:
        return self.one_task.kernel_targets(target)

    def check(self, prediction: Tensor, target: Tensor, name: str) -> None:
        pass

    def per_task(self, prediction: Tensor, target: Tensor) -> Tensor:
        return torch.func.vmap(self.one_task, randomness="different")(prediction, target)

    def constant(self, target: Tensor, prediction: Tensor) -> Tensor:
        return target

    def gradient(self, prediction: Tensor, constant: Tensor) -> Tensor:
        return gradients_per_task(self.one_task, second_order=torch.is_grad_enabled())(prediction, constant)


Loss = CrossEntropy | MeanSquaredError | CustomLoss


def as_loss(loss: str | Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """`"cross_entropy"`, `"mse"` or a callable, as a loss object; anything else raises ValueError."""
    if loss == "cross_entropy":
        return CrossEntropy()
    if loss == "mse":
        return MeanSquaredError()
    if callable(loss):
        return CustomLoss(loss)
    raise ValueError(f"loss must be 'cross_entropy', 'mse' or a callable(prediction, target), got {loss!r}")
