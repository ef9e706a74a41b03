"""`torchopt.accelerated_op.adam_op`: Adam's update of one tensor."""

from __future__ import annotations

from torch import Tensor

from fastmeta.functional.update_rules import average, root

__all__ = ["AdamOp"]


class AdamOp:
    """`op(mu, nu, updates, count) -> (mu, nu, updates)`: the averages of the gradient and its square with this one
    in them, and Adam's update without its rate, after `count` steps, this one counted.

    Args:
        b1, b2: decays of the averages.
        eps, eps_root: what is added to the root of the corrected average, and under it.
        inplace: whether the three tensors that are given are overwritten. Without, the update can be differentiated,
            any number of times; where the average is 0 derivatives are their limit.
    """

    def __init__(
        self, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, eps_root: float = 0.0, inplace: bool = True
    ):
        self.b1, self.b2, self.eps, self.eps_root, self.inplace = b1, b2, eps, eps_root, inplace

    def __call__(
        self, mu: Tensor, nu: Tensor, updates: Tensor | None, count: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if updates is None:
            return mu, nu, None
        new_mu, new_nu = average(mu, updates, self.b1), average(nu, updates * updates, self.b2)
        inside = new_nu / (1 - self.b2**count)
        below = root(inside + self.eps_root if self.eps_root else inside) + self.eps
        new = new_mu / (1 - self.b1**count) / below
        if self.inplace:
            return mu.copy_(new_mu), nu.copy_(new_nu), updates.copy_(new)
        return new_mu, new_nu, new
