"""`torchopt.linalg.utils`: what solvers are given."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import pytree

Matvec = Callable[[Any], Any]


def cat_shapes(tree: Any) -> tuple[int, ...]:
    """The sizes of all dimensions of all leaves."""
    return tuple(itertools.chain.from_iterable(leaf.shape for leaf in pytree.tree_leaves(tree)))


def normalize_matvec(matvec: Any | Matvec) -> Matvec:
    """A tree of square matrices as a function of a tree; a function as it is."""
    if callable(matvec):
        return matvec
    matrices, structure = pytree.tree_flatten(matvec)
    for m in matrices:
        if not isinstance(m, Tensor) or m.dim() != 2 or m.shape[0] != m.shape[1]:
            raise TypeError(f"Linear operator must be a square matrix, but has shape: {getattr(m, 'shape', None)}")

    def product(x: Any) -> Any:
        leaves = pytree.tree_leaves(x)
        if len(leaves) != len(matrices):
            raise ValueError(
                f"`x` must have the same number of leaves as `matvec`, but has {len(leaves)} leaves and `matvec` has "
                f"{len(matrices)} leaves"
            )
        return pytree.tree_unflatten(structure, [m @ v for m, v in zip(matrices, leaves, strict=True)])

    return product
