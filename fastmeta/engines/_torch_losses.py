"""The losses of `torch.nn`, recognised: formulas for all that they can be set to, and the kernels for what these know.

Settings are read at each call, since they may be changed, and weights moved to another device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.dispatch.labels import label_range, readable
from fastmeta.dispatch.library import plain_call

from ._custom_loss import CustomLoss
from ._losses import (
    BinaryCrossEntropy,
    CrossEntropy,
    ElementwiseLoss,
    Huber,
    Loss,
    MeanSquaredError,
    check_labels,
)


def of_torch(loss: Callable) -> Loss | None:
    """A loss object for one of torch's modules or functions that is known here, else None."""
    name = getattr(loss, "__name__", type(loss).__name__)
    if isinstance(loss, nn.Module):
        if type(loss) in _MODULES and _is_plain(loss):
            return _MODULES[type(loss)](loss, name)
        if type(loss).__module__ == nn.modules.loss.__name__:
            sums(loss)  # a row's loss is no task's
        return None
    known = [module for function, module in _FUNCTIONS.items() if function is loss]
    return _MODULES[known[0]](known[0](), name) if known else None


def sums(module: nn.Module) -> bool:
    """Whether it adds up and takes no mean."""
    reduction = getattr(module, "reduction", "mean")
    if reduction == "none":
        raise ValueError(
            f"loss: {type(module).__name__} with reduction='none' gives a loss for each row, where each task has one: "
            "use reduction='mean' or 'sum'"
        )
    return reduction == "sum"


def _is_plain(module: nn.Module) -> bool:
    """Whether calling it runs torch's own `forward` and nothing else."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return not any(hooks) and "forward" not in module.__dict__


class _OfTorch(Loss):
    in_kernels = None
    only = ""  # which of its settings the kernels know, beside the mean

    def __init__(self, module: nn.Module, name: str):
        sums(module)
        self.module, self.name = module, name
        self._custom = CustomLoss(module)
        self._known: tuple[tuple, Loss] | None = None  # what was found last, so that it stays the same object

    def known(self, targets: tuple[Tensor, ...]) -> tuple | None:
        """What its mean over these targets is among the losses that have a name: class and arguments."""
        return None

    @property
    def sums(self) -> bool:
        return sums(self.module)

    @property
    def served(self) -> str:
        return f"formulas: {self.why_not_in_kernels}"

    @property
    def why_not_in_kernels(self) -> str:
        return f"the kernels know {self.name!r} only as a mean{self.only}"

    def for_targets(self, *targets: Tensor) -> Loss:
        if not _is_plain(self.module):
            return self._custom
        found, known = None if self.sums else self.known(targets), self._known
        if found is None:
            return self
        if known is None or known[0] != found:
            self._known = known = found, found[0](*found[1:])
        return known[1]


class _CrossEntropyLoss(_OfTorch):
    """With `q[i, c] = (1 - eps) w_y [c = y] + eps / C w_c`, where eps is the label smoothing and w the class weights,
    and 0 for a row that is ignored, the gradient of a row's loss is `sum_c q[i, c] softmax - q[i]`; means divide by the
    sum of `w_y` over the rows that count. Probabilities as targets stand in place of `[c = y]`; their means divide by
    the number of rows.

    Classes are where torch has them: predictions `[T, B, C, ...]`, labels `[T, B, ...]` or probabilities as
    predictions.
    """

    only = ", without class weights and label smoothing, over labels [T, B] of which none is ignored"
    class_dim = 2

    def known(self, targets: tuple[Tensor, ...]) -> tuple | None:
        module = self.module
        if module.weight is not None or module.label_smoothing:
            return None
        if torch.compiler.is_compiling() or not plain_call(targets):
            return None
        for target in targets:
            if target.dtype != torch.int64 or target.dim() != 2 or not readable(target):
                return None
            if (target == module.ignore_index).any():
                return None
        return (CrossEntropy,)

    def check(self, shape: tuple[int, ...], target: Tensor, name: str, values: bool = True) -> None:
        if len(shape) < 3:
            raise ValueError(f"{name}: {self.name} takes predictions [T, B, C, ...], got shape {tuple(shape)}")
        weight, of_rows = self.module.weight, (*shape[:2], *shape[3:])
        if weight is not None and weight.shape != shape[2:3]:
            raise ValueError(f"loss: weight must have shape {[shape[2]]}, one for each class, got {list(weight.shape)}")
        if target.is_floating_point():
            if target.shape != shape:
                raise ValueError(
                    f"{name}: {self.name} takes probabilities of the prediction's shape {tuple(shape)}, or int64 "
                    f"labels of shape {of_rows}, got {target.dtype} of shape {tuple(target.shape)}"
                )
            return
        check_labels(self.name, shape, target, name, self.class_dim)
        if values and readable(target):
            label_range(name, target, shape[2], ignored=self.module.ignore_index)

    def one_task(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.per_task(prediction.unsqueeze(0), target.unsqueeze(0)).squeeze(0)

    def per_task(self, prediction: Tensor, target: Tensor) -> Tensor:
        module = self.module
        rows = F.cross_entropy(
            prediction.flatten(0, 1),
            target.flatten(0, 1),
            module.weight,
            ignore_index=module.ignore_index,
            reduction="none",
            label_smoothing=module.label_smoothing,
        )
        total = rows.reshape(*prediction.shape[:2], *prediction.shape[3:]).flatten(1).sum(1)
        return total if self.sums else total / self._row_weights(prediction, target).flatten(1).sum(1)

    def constant(self, target: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """What softmax is multiplied with, `[T, B, 1, ...]`, and minus `q`, both over what the mean divides by."""
        eps, weight, rows = self.module.label_smoothing, self.module.weight, self._row_weights(prediction, target)
        if weight is not None:
            weight = weight.view(-1, *[1] * (prediction.dim() - 3))
        if target.is_floating_point():
            wanted = target * (1 - eps) + eps / prediction.shape[2]
            wanted = wanted if weight is None else wanted * weight
        else:
            counted = self.counted(target, prediction.shape[2])
            labels = target.where(counted, 0).unsqueeze(2)
            wanted = torch.zeros_like(prediction).scatter(2, labels, (1 - eps) * rows.unsqueeze(2))
            if eps:
                smooth = eps / prediction.shape[2] * counted.to(prediction.dtype).unsqueeze(2)
                wanted = wanted + (smooth if weight is None else smooth * weight)
        if not self.sums:
            divisor = rows.flatten(1).sum(1)
            if not target.is_floating_point():  # where no row counts, all is 0 already, as in torch
                divisor = divisor.where(counted.flatten(1).any(1), 1)
            wanted = wanted / divisor.view(-1, *[1] * (prediction.dim() - 1))
        return wanted.sum(2, keepdim=True), -wanted

    def gradient(self, prediction: Tensor, constant: tuple[Tensor, Tensor]) -> Tensor:
        share, minus_wanted = constant
        return torch.addcmul(minus_wanted, share, torch.softmax(prediction, 2))

    def counted(self, labels: Tensor, num_classes: int) -> Tensor:
        return labels != self.module.ignore_index

    def _row_weights(self, prediction: Tensor, target: Tensor) -> Tensor:
        """What each row counts for in a mean, `[T, B, ...]`."""
        if target.is_floating_point():
            return prediction.new_ones(*prediction.shape[:2], *prediction.shape[3:])
        counted, weight = self.counted(target, prediction.shape[2]), self.module.weight
        if weight is None:
            return counted.to(prediction.dtype)
        return weight[target.where(counted, 0)].where(counted, 0)


class _MSELoss(_OfTorch, MeanSquaredError):
    def known(self, targets: tuple[Tensor, ...]) -> tuple | None:
        return (MeanSquaredError,)


class _HuberLoss(_OfTorch, Huber):
    @property
    def huber_delta(self) -> float:
        return self.module.delta

    def known(self, targets: tuple[Tensor, ...]) -> tuple | None:
        return (Huber, self.huber_delta) if self.huber_delta > 0 else None


class _SmoothL1Loss(_OfTorch, ElementwiseLoss):
    """The Huber loss over its delta."""

    only = " with beta=1"

    def known(self, targets: tuple[Tensor, ...]) -> tuple | None:
        return (Huber, 1.0) if self.module.beta == 1 else None

    def numbers(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(prediction, target, reduction="none", beta=self.module.beta)

    def slope(self, prediction: Tensor, target: Tensor) -> Tensor:
        difference, beta = prediction - target, self.module.beta
        return (difference / beta).clamp(-1.0, 1.0) if beta else difference.sign()


class _L1Loss(_OfTorch, ElementwiseLoss):
    why_not_in_kernels = Loss.why_not_in_kernels

    def numbers(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.l1_loss(prediction, target, reduction="none")

    def slope(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).sign()


class _BCEWithLogitsLoss(_OfTorch, BinaryCrossEntropy):
    only = " without weights"

    def known(self, targets: tuple[Tensor, ...]) -> tuple | None:
        return (BinaryCrossEntropy,) if self.module.weight is None and self.module.pos_weight is None else None

    def check(self, shape: tuple[int, ...], target: Tensor, name: str, values: bool = True) -> None:
        super().check(shape, target, name, values)
        for which in ("weight", "pos_weight"):
            weight = getattr(self.module, which)
            if weight is not None and not _broadcasts(weight.shape, shape[1:]):
                raise ValueError(
                    f"loss: {which} must broadcast to the shape {tuple(shape[1:])} of one task's predictions, got "
                    f"{tuple(weight.shape)}"
                )

    def numbers(self, prediction: Tensor, target: Tensor) -> Tensor:
        module = self.module
        return F.binary_cross_entropy_with_logits(
            prediction, target, module.weight, pos_weight=module.pos_weight, reduction="none"
        )

    def slope(self, prediction: Tensor, target: Tensor) -> Tensor:
        weight, positive = self.module.weight, self.module.pos_weight
        slope = torch.sigmoid(prediction)
        slope = slope - target if positive is None else (1 + (positive - 1) * target) * slope - positive * target
        return slope if weight is None else slope * weight


def _broadcasts(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    if len(shape) > len(wanted):
        return False
    return all(size in (1, other) for size, other in zip(reversed(shape), reversed(wanted), strict=False))


_MODULES: dict[type[nn.Module], type[_OfTorch]] = {
    nn.CrossEntropyLoss: _CrossEntropyLoss,
    nn.MSELoss: _MSELoss,
    nn.BCEWithLogitsLoss: _BCEWithLogitsLoss,
    nn.HuberLoss: _HuberLoss,
    nn.SmoothL1Loss: _SmoothL1Loss,
    nn.L1Loss: _L1Loss,
}
_FUNCTIONS: dict[Callable, type[nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.mse_loss: nn.MSELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    F.huber_loss: nn.HuberLoss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    F.l1_loss: nn.L1Loss,
}
