"""`torchopt.update`: parameters after their updates."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import pytree


def apply_updates(params: Any, updates: Any, *, inplace: bool = True) -> Any:
    """`params + updates`: into the parameters' own memory, or, for what is differentiated, as new tensors.

    A parameter whose update is None stays. Both are trees of one structure.
    """

    def applied(p: Tensor, u: Tensor | None) -> Tensor:
        if u is not None and inplace:
            p.data.add_(u)
        return p if u is None or inplace else p + u

    return pytree.tree_map(applied, params, updates)
