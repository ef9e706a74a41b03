"""`torchopt.hook`: hooks on the gradients that pass, for what autograd makes of them later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import pytree
from .base import EmptyState, GradientTransformation


def zero_nan_hook(g: Tensor) -> Tensor:
    """0 in place of NaN."""
    return g.nan_to_num(nan=0.0)


def nan_to_num_hook(
    nan: float = 0.0, posinf: float | None = None, neginf: float | None = None
) -> Callable[[Tensor], Tensor]:
    """A hook that puts numbers in place of NaN and infinities."""
    return lambda g: g.nan_to_num(nan=nan, posinf=posinf, neginf=neginf)


def register_hook(hook: Callable[[Tensor], Tensor | None]) -> GradientTransformation:
    """Registers `hook` on each gradient, and changes nothing else."""

    def update_fn(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        return pytree.tree_map_(lambda g: g.register_hook(hook), updates), state

    return GradientTransformation(lambda params: EmptyState(), update_fn)
