"""`torchopt.clip`: gradients of bounded norm."""

from __future__ import annotations

from typing import Any

import torch

from . import pytree
from .base import EmptyState, GradientTransformation


def clip_grad_norm(max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> GradientTransformation:
    """Scales all gradients so that the norm of all together is at most `max_norm`; the scale counts as a number."""

    def update_fn(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        grads = pytree.tree_leaves(updates)
        if not grads:
            return updates, state
        with torch.no_grad():
            norms = torch.stack([torch.linalg.vector_norm(g, norm_type).to(grads[0].device) for g in grads])
            norm = torch.linalg.vector_norm(norms, norm_type)
        if error_if_nonfinite and not norm.isfinite():
            raise RuntimeError(f"the norm of order {norm_type} of the gradients is {norm.item()}: it cannot be clipped")
        factor = min(max_norm / (norm.item() + 1e-6), 1.0)
        return pytree.tree_map(lambda g: g * factor, updates), state

    return GradientTransformation(lambda params: EmptyState(), update_fn)
