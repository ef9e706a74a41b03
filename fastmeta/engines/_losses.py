"""What an engine asks of a loss, and the losses that have a name: per-task values, and the gradient at the prediction,
itself differentiable.

Those with a name are means over the rows (and columns) of one task, as in `torch.nn.functional`; their gradients are
formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmeta._trees import described
from fastmeta.dispatch.labels import IGNORING, label_range, readable
from fastmeta.values import dtype_of

from ._task_tensor import TaskTensor


class Loss:
    """A loss of each task, of predictions `[T, B, ...]` and targets `[T, B, ...]`."""

    name: str
    in_kernels: str | None = None  # its name in the fused inner loops
    takes_trees = False  # whether predictions and targets may be several tensors
    huber_delta = 1.0  # theirs
    class_dim = -1  # of predictions, where targets are labels

    @property
    def served(self) -> str:
        """By what, for a user to read."""
        return "kernels and formulas"

    @property
    def why_not_in_kernels(self) -> str:
        return f"the kernels have no loss {self.name!r}"

    def captured(self) -> list[Tensor]:
        """Tensors that require gradients and belong to the loss alone, not being parameters of a module."""
        return []

    def for_targets(self, *targets: Tensor) -> Loss:
        """The form in which the loss is to run on these: one in the kernels, if they give the same. The same object for
        the same form."""
        return self

    def check(self, shape: tuple[int, ...], target: Tensor, name: str, values: bool = True) -> None:
        """Raise ValueError for targets that do not fit predictions of that shape; `values=False` leaves what only the
        data tells to the op that follows."""

    def kernel_targets(self, target: Tensor) -> Tensor:
        """All tasks' targets as the fused inner loops take them."""
        return target

    def one_task(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss `[]` of one task's `[B, ...]`."""
        raise NotImplementedError

    def per_task(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The losses `[T]`."""
        raise NotImplementedError

    def constant(self, target: Tensor, prediction: Tensor) -> Any:
        """The part of the gradient that stays the same in all inner steps."""
        return target

    def gradient(self, prediction: Tensor, constant: Any) -> Tensor:
        """Of each task's loss at its prediction, in the prediction's shape; `constant` as above."""
        raise NotImplementedError

    def counted(self, labels: Tensor, num_classes: int) -> Tensor | None:
        """Which labels `[T, B, ...]` the loss looks at; None for all."""
        return None


def count_of(prediction: Tensor, dims: slice) -> int:
    """Numbers along those dimensions, at least 1: what a mean divides by."""
    return max(prediction.shape[dims].numel(), 1)


class CrossEntropy(Loss):
    """Mean negative log-likelihood of softmax. Predictions `[T, B, C]`, labels int64 `[T, B]`; or a label for each
    position, `[T, B, L, C]` and `[T, B, L]`, whose mean is over all positions."""

    name = in_kernels = "cross_entropy"

    def one_task(self, prediction: Tensor, target: Tensor) -> Tensor:
        # torch's default ignores rows labelled -100, a label like any other out of range here: let it be refused
        return F.cross_entropy(prediction.flatten(0, -2), target.flatten(), ignore_index=-(2**62))

    def check(self, shape: tuple[int, ...], target: Tensor, name: str, values: bool = True) -> None:
        check_labels(self.name, shape, target, name)
        if values and readable(target):
            label_range(name, target, shape[-1], advice=IGNORING)

    def per_task(self, prediction: Tensor, target: Tensor) -> Tensor:
        rows = F.cross_entropy(prediction.flatten(0, -2), target.flatten(), reduction="none")
        return rows.view(target.shape).flatten(1).mean(1)

    def constant(self, target: Tensor, prediction: Tensor) -> Tensor:
        """Minus the one-hot labels over B."""
        return torch.zeros_like(prediction).scatter_(-1, target.unsqueeze(-1), -1.0 / count_of(target, slice(1, None)))

    def gradient(self, prediction: Tensor, constant: Tensor) -> Tensor:
        return torch.add(constant, torch.softmax(prediction, -1), alpha=1.0 / count_of(prediction, slice(1, -1)))


def check_labels(loss: str, shape: tuple[int, ...], target: Tensor, name: str, class_dim: int = -1) -> None:
    wanted = list(shape)
    del wanted[class_dim]
    if target.dtype != torch.int64 or list(target.shape) != wanted:
        where = "last" if class_dim == -1 else "behind the rows"
        raise ValueError(
            f"{name}: {loss} takes int64 labels of shape {_of_tasks(wanted)}, got {dtype_of(target)} of shape "
            f"{_of_tasks(target.shape)}; predictions are {_of_tasks(shape)}, classes {where}"
        )


def _of_tasks(shape: Sequence[int]) -> str:
    """The number of tasks may be that of a group of them, which says nothing to the user."""
    return f"[{', '.join(['T', *map(str, shape[1:])])}]"


class ElementwiseLoss(Loss):
    """Mean, or sum, over the numbers of one task. Predictions and targets `[T, B, O]`."""

    factor = 1.0
    sums = False

    def numbers(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss of each number."""
        raise NotImplementedError

    def slope(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Its derivative over `factor`."""
        raise NotImplementedError

    def check(self, shape: tuple[int, ...], target: Tensor, name: str, values: bool = True) -> None:
        # torch broadcasts [B] against [B, 1] to [B, B] with a mere warning, or none: refused here.
        if target.shape != shape or not target.is_floating_point():
            advice = ": give .unsqueeze(-1) of it" if (*target.shape, 1) == tuple(shape) else ""
            raise ValueError(
                f"{name}: {self.name} takes floating-point targets of the prediction's shape "
                f"{_of_tasks(shape)}, got {dtype_of(target)} of shape {_of_tasks(target.shape)}{advice}"
            )

    def one_task(self, prediction: Tensor, target: Tensor) -> Tensor:
        numbers = self.numbers(prediction, target)
        return numbers.sum() if self.sums else numbers.mean()

    def per_task(self, prediction: Tensor, target: Tensor) -> Tensor:
        numbers = self.numbers(prediction, target).flatten(1)
        return numbers.sum(1) if self.sums else numbers.mean(1)

    def gradient(self, prediction: Tensor, constant: Tensor) -> Tensor:
        share = 1 if self.sums else count_of(prediction, slice(1, None))
        return self.slope(prediction, constant) * (self.factor / share)


class MeanSquaredError(ElementwiseLoss):
    name = in_kernels = "mse"
    factor = 2.0

    def numbers(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(prediction, target, reduction="none")

    def slope(self, prediction: Tensor, target: Tensor) -> Tensor:
        return prediction - target


class BinaryCrossEntropy(ElementwiseLoss):
    """Of logits, with targets from 0 to 1."""

    name = in_kernels = "binary_cross_entropy"

    def numbers(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(prediction, target, reduction="none")

    def slope(self, prediction: Tensor, target: Tensor) -> Tensor:
        return torch.sigmoid(prediction) - target


class Huber(ElementwiseLoss):
    """Square below `delta`, linear above."""

    name = in_kernels = "huber"

    def __init__(self, delta: float = 1.0):
        self.huber_delta = delta

    def numbers(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.huber_loss(prediction, target, reduction="none", delta=self.huber_delta)

    def slope(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).clamp(-self.huber_delta, self.huber_delta)


def check_prediction(loss: Loss, prediction: Tensor, target: Tensor, name: str) -> None:
    """Raise ValueError unless the loss takes such predictions `[T, B, ...]` and targets, which errors call `name`."""
    if isinstance(prediction, Tensor):
        loss.check(prediction.shape, target, name)
    elif not loss.takes_trees:
        raise ValueError(
            f"loss {loss.name!r} takes one tensor, but the model returned {described(prediction)}: give a loss "
            "(prediction, target) -> scalar that takes of it what it needs"
        )


def check_one_tensor(loss: Loss, name: str, target: Tensor) -> None:
    """Raise ValueError for targets of several tensors, unless the loss is one of the user's own."""
    if not isinstance(target, Tensor) and not loss.takes_trees:
        raise ValueError(
            f"{name}: loss {loss.name!r} takes one tensor, got {described(target)}: give a loss "
            "(prediction, target) -> scalar that takes of them what it needs"
        )


def loss_of_task(loss: Loss, prediction: Tensor, target: Tensor, name: str) -> Tensor:
    """The loss of one task's prediction `[B, ...]`, after `check_prediction`."""
    if isinstance(prediction, TaskTensor) and isinstance(target, TaskTensor):  # of all tasks
        check_prediction(loss, prediction.values, target.values, name)
        return TaskTensor(loss.per_task(prediction.values, target.values))
    if isinstance(prediction, Tensor) and isinstance(target, Tensor):
        loss.check((1, *prediction.shape), target.unsqueeze(0), name)
    else:
        check_prediction(loss, prediction, target, name)
    return loss.one_task(prediction, target)


NAMED = {loss.name: loss for loss in (CrossEntropy, MeanSquaredError, BinaryCrossEntropy, Huber)}
