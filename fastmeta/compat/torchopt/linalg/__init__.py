"""`torchopt.linalg`: solutions of linear systems of trees of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import pytree
from . import utils
from .utils import Matvec, cat_shapes, normalize_matvec

__all__ = ["cg", "ns", "ns_inv", "utils"]

def cg(
    A: Any | Matvec,
    b: Any,
    x0: Any = None,
    *,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
    M: Any | Matvec | None = None,
) -> Any:
    """Solves `A x = b` by conjugate gradients (Hestenes and Stiefel 1952) for a symmetric positive definite A.

    Args:
        A: a function of a tree, or a tree of square matrices.
        b: a tree of tensors.
        x0: where to start. Default: 0.
        rtol, atol: the squared residual is to be at most the larger of `rtol^2 |b|^2` and `atol^2`.
        maxiter: the most steps. Default: ten times the sum of the sizes of b's dimensions.
        M: an approximate inverse of A.
    """
    x = pytree.tree_map(torch.zeros_like, b) if x0 is None else x0
    if cat_shapes(x) != cat_shapes(b):
        raise ValueError(f"Tensors in x0 and b must have matching shapes: {cat_shapes(x)} vs. {cat_shapes(b)}.")
    maxiter = 10 * sum(cat_shapes(b)) if maxiter is None else maxiter
    A, precondition = normalize_matvec(A), normalize_matvec(M) if M is not None else (lambda r: r)
    enough = max(rtol**2 * pytree.tree_vdot_real(b, b), atol**2)
    r = pytree.tree_add_scalar_mul(b, A(x), -1.0)
    p = z = precondition(r)
    gamma = pytree.tree_vdot_real(r, z)
    for _ in range(maxiter):
        if (gamma if M is None else pytree.tree_vdot_real(r, r)) <= enough:
            break
        along = A(p)
        alpha = gamma / pytree.tree_vdot_real(p, along)
        x = pytree.tree_add_scalar_mul(x, p, alpha)
        r = pytree.tree_add_scalar_mul(r, along, -alpha)
        z = precondition(r)
        gamma, before = pytree.tree_vdot_real(r, z), gamma
        p = pytree.tree_add_scalar_mul(z, p, gamma / before)
    return x


def ns(A: Any | Matvec, b: Any, maxiter: int | None = None, *, alpha: float | None = None) -> Any:
    """`A^-1 b` by `maxiter` terms (default 10) of the Neumann series `a sum_k (I - a A)^k b`, a = `alpha` or 1."""
    A, step = normalize_matvec(A), 1.0 if alpha is None else alpha
    total = v = b
    for _ in range(10 if maxiter is None else maxiter):
        v = pytree.tree_add_scalar_mul(v, A(v), -step)
        total = pytree.tree_add_scalar_mul(total, v)
    return pytree.tree_map(lambda t: step * t, total)


def ns_inv(A: Any, maxiter: int | None = None, *, alpha: float | None = None) -> Any:
    """The inverses of square matrices by `maxiter` terms (default 10) of their Neumann series."""
    step = 1.0 if alpha is None else alpha

    def inverse(matrix: Tensor) -> Tensor:
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"`A` must be a square matrix, but has shape: {matrix.shape}")
        rest = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device) - step * matrix
        powers = [torch.linalg.matrix_power(rest, k) for k in range(10 if maxiter is None else maxiter)]
        return step * sum(powers, torch.zeros_like(matrix))

    return pytree.tree_map(inverse, A)
