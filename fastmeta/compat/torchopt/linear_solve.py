"""`torchopt.linear_solve`: solvers of linear systems, for implicit differentiation.

Each is made with its options, and is then called as `solve(matvec, b)` on trees of tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import linalg, pytree

Solver = Callable[[linalg.Matvec, Any], Any]


def _with_ridge(matvec: linalg.Matvec, ridge: float | None) -> linalg.Matvec:
    return matvec if ridge is None else lambda x: pytree.tree_add_scalar_mul(matvec(x), x, ridge)


def _solve_cg(matvec: linalg.Matvec, b: Any, ridge: float | None = None, init: Any = None, **kwargs: Any) -> Any:
    return linalg.cg(_with_ridge(matvec, ridge), b, init, **kwargs)


def solve_cg(**kwargs: Any) -> Solver:
    """Conjugate gradients, of a symmetric positive definite system: `ridge`, what is added to its diagonal; `init`,
    where to start; and the options of `torchopt.linalg.cg`."""
    return functools.partial(_solve_cg, **kwargs)


def _solve_normal_cg(matvec: linalg.Matvec, b: Any, ridge: float | None = None, init: Any = None, **kwargs: Any) -> Any:
    # the system is linear: what it does to a cotangent does not depend on where it is looked at
    _, transposed = torch.func.vjp(matvec, pytree.tree_map(torch.zeros_like, b if init is None else init))
    normal = _with_ridge(lambda x: transposed(matvec(x))[0], ridge)
    return linalg.cg(normal, transposed(b)[0], init, **kwargs)


def solve_normal_cg(**kwargs: Any) -> Solver:
    """Conjugate gradients on the normal equations `A^T A x = A^T b`, of any system. Options as those of `solve_cg`."""
    return functools.partial(_solve_normal_cg, **kwargs)


def _solve_inv(matvec: linalg.Matvec, b: Any, ridge: float | None = None, ns: bool = False, **kwargs: Any) -> Any:
    matvec = _with_ridge(matvec, ridge)
    leaves, structure = pytree.tree_flatten(b)
    if ns and not (len(leaves) == 1 and leaves[0].dim() == 0):
        return linalg.ns(matvec, b, **kwargs)

    def solved(i: int, leaf: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            others = [x.view_as(t) if j == i else torch.zeros_like(t) for j, t in enumerate(leaves)]
            return pytree.tree_leaves(matvec(pytree.tree_unflatten(structure, others)))[i].reshape(-1)

        matrix = torch.func.jacfwd(block)(torch.zeros_like(leaf).reshape(-1))
        return torch.linalg.solve(matrix, leaf.reshape(-1)).view_as(leaf)

    return pytree.tree_unflatten(structure, [solved(i, leaf) for i, leaf in enumerate(leaves)])


def solve_inv(**kwargs: Any) -> Solver:
    """A direct solution, of small systems: `ridge`; `ns`, by the Neumann series and the options of
    `torchopt.linalg.ns` instead. As in TorchOpt, of several tensors each is solved for by itself: what lies between
    their blocks is left out."""
    return functools.partial(_solve_inv, **kwargs)
