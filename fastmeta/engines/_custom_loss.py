"""Any callable as a loss: its gradient is autograd's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmeta._trees import flatten, unbind, unflatten

from ..functional.second_order import differentiate
from ._captured import captured
from ._exact import gradients_per_task, outside_inference_mode
from ._losses import Loss


class CustomLoss(Loss):
    """A callable `(prediction, target) -> scalar` for one task, batched over tasks by `torch.func.vmap`, or called for
    one task after the other where it cannot be mapped: with masks of the data's size, say.

    One that the fused inner loops know too has an attribute `in_kernels`, its name there, and a method `kernel_targets`
    that turns all tasks' targets `[T, B, ...]` into theirs. Predictions and targets of several tensors are handed to it
    as the model and the batch have them, those of one task.
    """

    takes_trees = True

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]):
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        self.in_kernels = getattr(function, "in_kernels", None)
        self.mappable = True  # until it has failed

    @property
    def served(self) -> str:
        if self.in_kernels is not None:
            return "kernels, or autograd mapped over tasks"
        if self.mappable:
            return "autograd, mapped over tasks where torch.func can follow it"
        return "autograd, one task after the other: torch.func cannot map it"

    def captured(self) -> list[Tensor]:
        return captured(self.function)

    def kernel_targets(self, target: Tensor) -> Tensor:
        return self.function.kernel_targets(target)

    def one_task(self, prediction: Tensor, target: Tensor) -> Tensor:
        return _one_number(self.function(prediction, target), self.name)

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

    def counted(self, labels: Tensor, num_classes: int) -> Tensor:
        """All that are classes, but for those that the loss says it ignores."""
        counted = (labels >= 0) & (labels < num_classes)
        ignored = getattr(self.function, "ignore_index", None)
        return counted if ignored is None else counted & (labels != ignored)


def _one_number(loss: Tensor, name: str) -> Tensor:
    """`[]` of what a callable has returned for one task: a tensor of one number, as `backward` takes it."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss {name!r} must return a tensor for each task, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"loss {name!r} must return one number for each task, got shape {list(loss.shape)}")
    return loss if loss.dim() == 0 else loss.reshape(())


@outside_inference_mode
def _plain_gradient(losses: Callable[[Tensor, Tensor], Tensor], prediction: Tensor, target: Tensor) -> Tensor:
    """The gradient `[T, B, C]` of each task's loss at its prediction, by plain autograd."""
    second_order = torch.is_grad_enabled()
    with torch.enable_grad():
        at = prediction if second_order and prediction.requires_grad else prediction.detach().requires_grad_()
        total = losses(at, target).sum()
        return differentiate(total, at, create_graph=second_order, materialize_grads=True)[0]
