"""The losses an engine knows: per-task values, and the gradient at the prediction, itself differentiable.

Those that have a name are means over the rows (and columns) of one task, as in `torch.nn.functional`; their gradients
are formulas.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmeta._trees import described, flatten, unbind, unflatten
from fastmeta.dispatch.labels import label_range

from ._exact import gradients_per_task, outside_inference_mode


class RowLoss:
    """A loss that is a mean over rows.

    `check(shape, target, name)` refuses targets that do not fit predictions of that shape; `values=False` leaves what
    only the data tells to the op that follows.
    """

    in_kernels: str | None = None  # its name in the fused inner loops
    takes_trees = False  # whether predictions and targets may be several tensors

    def kernel_targets(self, target: Tensor) -> Tensor:
        return target


class CrossEntropy(RowLoss):
    """Mean negative log-likelihood of softmax. Predictions `[T, B, C]`, labels int64 `[T, B]`; or a label for each
    position, `[T, B, L, C]` and `[T, B, L]`, whose mean is over all positions."""

    name = "cross_entropy"
    in_kernels = name

    @staticmethod
    def one_task(prediction: Tensor, target: Tensor) -> Tensor:
        # torch's default ignores rows labelled -100, a label like any other out of range here: let it be refused
        return F.cross_entropy(prediction.flatten(0, -2), target.flatten(), ignore_index=-(2**62))

    def check(self, shape: tuple[int, ...], target: Tensor, name: str, values: bool = True) -> None:
        if target.dtype != torch.int64 or target.shape != shape[:-1]:
            raise ValueError(
                f"{name}: cross_entropy takes int64 labels of shape {tuple(shape[:-1])}, "
                f"got {target.dtype} of shape {tuple(target.shape)}"
            )
        if values and not (torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling()):
            label_range(name, target, shape[-1])

    def per_task(self, prediction: Tensor, target: Tensor) -> Tensor:
        rows = F.cross_entropy(prediction.flatten(0, -2), target.flatten(), reduction="none")
        return rows.view(target.shape).flatten(1).mean(1)

    def constant(self, target: Tensor, prediction: Tensor) -> Tensor:
        """The part of the gradient that stays the same in all inner steps: minus the one-hot labels over B."""
        return torch.zeros_like(prediction).scatter_(-1, target.unsqueeze(-1), -1.0 / max(target.shape[1:].numel(), 1))

    def gradient(self, prediction: Tensor, constant: Tensor) -> Tensor:
        return torch.add(constant, torch.softmax(prediction, -1), alpha=1.0 / max(prediction.shape[1:-1].numel(), 1))


class ElementwiseLoss(RowLoss):
    """Mean over the numbers of one task. Predictions and targets `[T, B, O]`."""

    name: str
    one_task: Callable[[Tensor, Tensor], Tensor]
    factor = 1.0

    def check(self, shape: tuple[int, ...], target: Tensor, name: str, values: bool = True) -> None:
        # torch broadcasts [B] against [B, 1] to [B, B] with a mere warning, or none: refused here.
        if target.shape != shape or not target.is_floating_point():
            raise ValueError(
                f"{name}: {self.name} takes floating-point targets of the prediction's shape "
                f"{tuple(shape)}, got {target.dtype} of shape {tuple(target.shape)}"
            )

    def per_task(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.one_task(prediction, target, reduction="none").flatten(1).mean(1)

    def constant(self, target: Tensor, prediction: Tensor) -> Tensor:
        return target

    def gradient(self, prediction: Tensor, constant: Tensor) -> Tensor:
        per_task = prediction[0].numel() if prediction.shape[0] else 1
        return self.slope(prediction, constant) * (self.factor / max(per_task, 1))

    def slope(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The derivative of each number's loss over `factor`."""
        raise NotImplementedError


class MeanSquaredError(ElementwiseLoss):
    name = in_kernels = "mse"
    one_task = staticmethod(F.mse_loss)
    factor = 2.0

    def slope(self, prediction: Tensor, target: Tensor) -> Tensor:
        return prediction - target


class BinaryCrossEntropy(ElementwiseLoss):
    """Of logits, with targets from 0 to 1."""

    name = in_kernels = "binary_cross_entropy"
    one_task = staticmethod(F.binary_cross_entropy_with_logits)

    def slope(self, prediction: Tensor, target: Tensor) -> Tensor:
        return torch.sigmoid(prediction) - target


class Huber(ElementwiseLoss):
    """Square below 1, linear above."""

    name = in_kernels = "huber"
    one_task = staticmethod(F.huber_loss)

    def slope(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).clamp(-1.0, 1.0)


class CustomLoss:
    """A callable `(prediction, target) -> scalar` for one task, batched over tasks by `torch.func.vmap`, or called for
    one task after the other where it cannot be mapped: with masks of the data's size, say.

    One that the fused inner loops know too has an attribute `in_kernels`, its name there, and a method `kernel_targets`
    that turns all tasks' targets `[T, B, ...]` into theirs. Predictions and targets of several tensors are handed to it
    as the model and the batch have them, those of one task.
    """

    takes_trees = True

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]):
        self.one_task = function
        self.name = getattr(function, "__name__", type(function).__name__)
        self.in_kernels: str | None = getattr(function, "in_kernels", None)
        self.mappable = True  # until it has failed

    def kernel_targets(self, target: Tensor) -> Tensor:
        return self.one_task.kernel_targets(target)

    def check(self, shape: tuple[int, ...], target: Tensor, name: str, values: bool = True) -> None:
        pass

    def per_task(self, prediction: Tensor, target: Tensor) -> Tensor:
        if self.mappable:
            try:
                function, leaves = self._of_leaves(prediction, target)
                return torch.func.vmap(function, randomness="different")(*leaves)
            except Exception:  # what is wrong with the loss itself, plain torch says in its own words
                losses = self._one_by_one(prediction, target)
                self.mappable = False
                return losses
        return self._one_by_one(prediction, target)

    def _of_leaves(self, prediction: Tensor, target: Tensor) -> tuple[Callable, tuple[list[Tensor], list[Tensor]]]:
        """The loss as a function of lists of tensors, of one task each, and the lists of all tasks'."""
        (found, predictions), (rows, targets) = flatten(prediction), flatten(target)

        def one_task(found: list[Tensor], rows: list[Tensor]) -> Tensor:
            return self.one_task(unflatten(predictions, found), unflatten(targets, rows))

        return one_task, (found, rows)

    def _one_by_one(self, prediction: Tensor, target: Tensor) -> Tensor:
        return torch.stack([self.one_task(p, t) for p, t in zip(unbind(prediction), unbind(target), strict=True)])

    def constant(self, target: Tensor, prediction: Tensor) -> Tensor:
        return target

    def gradient(self, prediction: Tensor, constant: Tensor) -> Tensor:
        if self.mappable:
            try:
                function, leaves = self._of_leaves(prediction, constant)
                return gradients_per_task(function, second_order=torch.is_grad_enabled())(*leaves)[0]
            except Exception:
                if torch._C._are_functorch_transforms_active():
                    raise
        gradient = _plain_gradient(self._one_by_one, prediction, constant)
        self.mappable = False
        return gradient


@outside_inference_mode
def _plain_gradient(losses: Callable[[Tensor, Tensor], Tensor], prediction: Tensor, target: Tensor) -> Tensor:
    """The gradient `[T, B, C]` of each task's loss at its prediction, by plain autograd."""
    second_order = torch.is_grad_enabled()
    with torch.enable_grad():
        at = prediction if second_order and prediction.requires_grad else prediction.detach().requires_grad_()
        total = losses(at, target).sum()
        return torch.autograd.grad(total, at, create_graph=second_order, materialize_grads=True)[0]


Loss = CrossEntropy | ElementwiseLoss | CustomLoss


def check_prediction(loss: Loss, prediction: Tensor, target: Tensor, name: str) -> None:
    """Raise ValueError unless the loss takes such predictions `[T, B, ...]` and targets, which errors call `name`."""
    check_one_tensor(loss, name, target)
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
    if isinstance(prediction, Tensor) and isinstance(target, Tensor):
        loss.check((1, *prediction.shape), target.unsqueeze(0), name)
    else:
        check_prediction(loss, prediction, target, name)
    return loss.one_task(prediction, target)


_NAMED = {loss.name: loss for loss in (CrossEntropy, MeanSquaredError, BinaryCrossEntropy, Huber)}


def as_loss(loss: str | Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """A loss object of that name or for that callable; anything else raises ValueError."""
    if isinstance(loss, str) and loss in _NAMED:
        return _NAMED[loss]()
    if callable(loss):
        return CustomLoss(loss)
    raise ValueError(f"loss must be one of {', '.join(_NAMED)}, or a callable(prediction, target), got {loss!r}")
