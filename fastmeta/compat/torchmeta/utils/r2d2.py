"""Ridge regression in closed form (Bertinetto et al. 2019, "Meta-learning with differentiable closed-form solvers")."""

from __future__ import annotations

import warnings
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ridge_regression"]


class _WeightAndBias(NamedTuple):
    weight: Tensor
    bias: Tensor | None


def ridge_regression(
    embeddings: Tensor,
    targets: Tensor,
    reg_lambda: float | Tensor,
    num_classes: int | None = None,
    use_woodbury: bool | None = None,
    scale: bool = True,
    bias: bool = True,
) -> _WeightAndBias:
    """The linear function that minimises `|X W - Y|^2 + reg_lambda |W|^2` for one task, differentiable.

    Args:
        embeddings: X, `[S, D]`.
        targets: Y, `[S, O]` floating; or classes, `[S]` int64, of which the one-hot code is taken.
        reg_lambda: a number or a tensor.
        num_classes: of a classification; None (default) counts them in `targets`, and warns.
        use_woodbury: solve a system of S rows in place of D; None (default) takes the smaller.
        scale: divide X and Y by the root of S (default True).
        bias: fit one (default True); it is regularised as the weight is.

    Returns:
        A named tuple: weight `[O, D]`, and bias `[O]` or None.

    Raises:
        ValueError: floating `targets` that are not of two dimensions.
    """
    rows, width = embeddings.shape
    if not targets.dtype.is_floating_point:
        if num_classes is None:
            warnings.warn(
                "`num_classes` is not given: ridge_regression takes the number of classes found in `targets`, which a "
                "task without examples of its last class would get wrong",
                stacklevel=2,
            )
        targets = F.one_hot(targets, -1 if num_classes is None else num_classes).to(embeddings.dtype)
    elif num_classes is None and targets.dim() != 2:
        raise ValueError(f"`targets` of a regression must have the shape [S, O], got {tuple(targets.shape)}")
    if use_woodbury is None:
        use_woodbury = rows <= width + bias
    if bias:
        embeddings = torch.cat([embeddings.new_ones(rows, 1), embeddings], 1)
    if scale:
        embeddings, targets = embeddings / sqrt(rows), targets / sqrt(rows)
    gram = embeddings @ embeddings.T if use_woodbury else embeddings.T @ embeddings
    ridge = gram + reg_lambda * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if use_woodbury:
        solution = embeddings.T @ torch.linalg.solve(ridge, targets)
    else:
        solution = torch.linalg.solve(ridge, embeddings.T @ targets)
    return _WeightAndBias(solution[1:].T, solution[0]) if bias else _WeightAndBias(solution.T, None)
