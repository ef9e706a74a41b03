"""`torchopt.alias`: optimisers as functions, `init(params)` and `update(updates, state, params=, inplace=)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastmeta.compat._absent import not_here

from .. import transform
from ..base import GradientTransformation
from ..transform import add_decayed_weights, check_adam, check_momentum, scale_by_adam, trace
from . import utils
from .utils import chained, flip_sign_and_add_weight_decay, scale_by_neg_lr

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


__all__ = ["adam", "adamw", "rmsprop", "sgd", "utils"]
__getattr__ = not_here(__name__, "TorchOpt 0.7.3", ("adadelta", "adagrad", "adamax", "radam"))
