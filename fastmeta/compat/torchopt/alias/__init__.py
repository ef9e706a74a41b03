"""`torchopt.alias`: optimisers as functions, `init(params)` and `update(updates, state, params=, inplace=)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import transform
from ..base import GradientTransformation
from ..transform import add_decayed_weights, check_adam, check_momentum, scale_by_adam, trace
from . import utils
from .utils import chained, flip_sign_and_add_weight_decay, scale_by_neg_lr

__all__ = ["adadelta", "adagrad", "adam", "adamax", "adamw", "radam", "rmsprop", "sgd", "utils"]

Rate = float | Callable[[Any], Any]  # a number, or a function of the steps taken


def adam(
    lr: Rate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    eps_root: float = 0.0,
    moment_requires_grad: bool = False,
    maximize: bool = False,
    use_accelerated_op: bool = False,
) -> GradientTransformation:
    """Adam; the decay enters the gradient. `use_accelerated_op` changes nothing."""
    check_adam(eps, betas)
    return chained(
        flip_sign_and_add_weight_decay(weight_decay, maximize),
        scale_by_adam(*betas, eps, eps_root, moment_requires_grad),
        scale_by_neg_lr(lr),
    )


def adamw(
    lr: Rate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    *,
    eps_root: float = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    moment_requires_grad: bool = False,
    maximize: bool = False,
    use_accelerated_op: bool = False,
) -> GradientTransformation:
    """Adam whose weights decay by `lr * weight_decay` themselves; `mask`, of the leaves in order, says which.
    `use_accelerated_op` changes nothing."""
    check_adam(eps, betas)
    return chained(
        flip_sign_and_add_weight_decay(0.0, maximize),
        scale_by_adam(*betas, eps, eps_root, moment_requires_grad),
        add_decayed_weights(weight_decay, mask),
        scale_by_neg_lr(lr),
    )


def sgd(
    lr: Rate,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    *,
    moment_requires_grad: bool = False,
    maximize: bool = False,
) -> GradientTransformation:
    """Gradient descent with momentum."""
    check_momentum(momentum, dampening, nesterov)
    return chained(
        flip_sign_and_add_weight_decay(weight_decay, maximize),
        trace(momentum, dampening, nesterov, moment_requires_grad),
        scale_by_neg_lr(lr),
    )


def rmsprop(
    lr: Rate = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    *,
    initial_scale: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> GradientTransformation:
    """RMSProp; the average starts at `initial_scale`."""
    return chained(
        flip_sign_and_add_weight_decay(weight_decay, maximize),
        (transform.scale_by_stddev if centered else transform.scale_by_rms)(alpha, eps, initial_scale),
        trace(momentum, 0.0, nesterov),
        scale_by_neg_lr(lr),
    )


def adadelta(
    lr: Rate = 1e-3,
    rho: float = 0.9,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    moment_requires_grad: bool = False,
) -> GradientTransformation:
    """Adadelta."""
    return chained(
        flip_sign_and_add_weight_decay(weight_decay),
        transform.scale_by_adadelta(rho, eps, moment_requires_grad),
        scale_by_neg_lr(lr),
    )


def adagrad(
    lr: Rate = 1e-2,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Adagrad; the rate falls as `1 / (1 + lr_decay * steps)`."""
    named = (("lr_decay", lr_decay), ("initial_accumulator_value", initial_accumulator_value), ("epsilon", eps))
    for name, value in named:
        if not value >= 0.0:
            raise ValueError(f"Invalid {name} value: {value}")
    return chained(
        flip_sign_and_add_weight_decay(weight_decay, maximize),
        transform.scale_by_rss(initial_accumulator_value, eps),
        transform.scale_by_schedule(lambda count: 1 / (1 + lr_decay * count)),
        scale_by_neg_lr(lr),
    )


def adamax(
    lr: Rate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    moment_requires_grad: bool = False,
) -> GradientTransformation:
    """Adamax."""
    return chained(
        flip_sign_and_add_weight_decay(weight_decay),
        transform.scale_by_adamax(*betas, eps, moment_requires_grad),
        scale_by_neg_lr(lr),
    )


def radam(
    lr: Rate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    moment_requires_grad: bool = False,
) -> GradientTransformation:
    """Rectified Adam."""
    return chained(
        flip_sign_and_add_weight_decay(weight_decay),
        transform.scale_by_radam(*betas, eps, moment_requires_grad),
        scale_by_neg_lr(lr),
    )
