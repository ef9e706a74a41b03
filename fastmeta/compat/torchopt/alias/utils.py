"""`torchopt.alias.utils`: what all optimisers begin and end with, and which kind of chain they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..base import GradientTransformation, identity
from ..combine import chain, chain_flat
from ..transform import scale, scale_by_schedule, stateless

_flat = True


def _set_use_chain_flat(use_chain_flat: bool) -> None:
    """Whether optimisers made from now on work on lists of leaves, as they do, or on the trees that they are given."""
    global _flat
    _flat = use_chain_flat


def _get_use_chain_flat() -> bool:
    return _flat


def chained(*transformations: GradientTransformation) -> GradientTransformation:
    return (chain_flat if _flat else chain)(*transformations)


def flip_sign_and_add_weight_decay(weight_decay: float = 0.0, maximize: bool = False) -> GradientTransformation:
    """`g + weight_decay * p`, with -g in place of g where the loss is maximised."""
    if not weight_decay >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")
    sign = -1 if maximize else 1
    if isinstance(weight_decay, Tensor) or weight_decay > 0.0:
        return stateless(lambda g, p: sign * g + weight_decay * p, with_params=True)
    return stateless(torch.neg) if maximize else identity()


def scale_by_neg_lr(lr: float | Callable[[Any], Any]) -> GradientTransformation:
    """`-lr * g`; `lr` may be a function of the steps taken."""
    if not (callable(lr) or lr >= 0.0):
        raise ValueError(f"Invalid learning rate: {lr}")
    return scale_by_schedule(lambda count: -lr(count)) if callable(lr) else scale(-lr)
