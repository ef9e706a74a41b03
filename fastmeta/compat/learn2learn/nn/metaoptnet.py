"""The support vector classifier of MetaOptNet, whose quadratic programme qpth solves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPS = 1e-8


def _solver():
    try:
        from qpth.qp import QPFunction
    except ImportError as error:
        raise ImportError("qpth required. Try: pip install qpth") from error
    return QPFunction


def kronecker(A: Tensor, B: Tensor) -> Tensor:
    return torch.kron(A, B)


def onehot(x: Tensor, dim: int) -> Tensor:
    """float32 `[S, dim]`, 1 at the labels `x` `[S]`."""
    return torch.nn.functional.one_hot(x.long().view(-1), dim).float()


def _solution(support: Tensor, labels: Tensor, ways: int, C_reg: float, max_iters: int) -> Tensor:
    """The dual variables `[S, ways]` of the classifier of Crammer and Singer (Lee et al. 2019, equation 6): least
    `1/2 a^T (K x I + I) a - y^T a` where no `a` exceeds `C_reg` at its row's label and 0 elsewhere, and each row's sum
    is 0."""
    rows, of = len(support), {"device": support.device, "dtype": support.dtype}
    kernel = torch.kron(support @ support.t(), torch.eye(ways, **of)) + torch.eye(ways * rows, **of)
    labels = onehot(labels, ways).to(**of).view(1, -1)
    sums = torch.kron(torch.eye(rows, **of), torch.ones(1, ways, **of))
    solve = _solver()(verbose=False, maxIter=max_iters)
    bounds = torch.eye(rows * ways, **of), C_reg * labels
    return solve(kernel, -labels, *bounds, sums, torch.zeros(1, rows, **of)).reshape(rows, ways)


def svm_logits(
    query: Tensor, support: Tensor, labels: Tensor, ways: int, shots: int, C_reg: float = 0.1, max_iters: int = 15
) -> Tensor:
    """What `SVClassifier` of the same gives for `query` `[Q, D]`, `[Q, ways]`; `shots` does nothing."""
    return query @ support.t() @ _solution(support, labels, ways, C_reg, max_iters)


class SVClassifier(nn.Module):
    """Logits of query features from a support vector machine fitted to support features, in their graph (Lee et al.
    2019, "Meta-Learning with Differentiable Convex Optimization").

    Args:
        support: features `[S, D]`; with `labels` `[S]` given to `fit_` at once.
        labels: int64 in [0, ways).
        ways: classes; by default as many as there are different labels.
        normalize: whether all features are divided by their norm plus 1e-8; False by default.
        C_reg: weight of the slack; 0.1 by default.
        max_iters: of the solver; 15 by default.

    Raises:
        ImportError: `fit_` without qpth installed.
    """

    def __init__(
        self, support=None, labels=None, ways=None, normalize: bool = False, C_reg: float = 0.1, max_iters: int = 15
    ):
        super().__init__()
        self.C_reg = C_reg
        self.max_iters = max_iters
        self._normalize = normalize
        if support is not None and labels is not None:
            self.fit_(support, labels, ways)

    def fit_(self, support: Tensor, labels: Tensor, ways=None, C_reg=None, max_iters=None) -> None:
        """Solves for the support rows; arguments that are None are the classifier's own."""
        if self._normalize:
            support = self.normalize(support)
        self.ways = len(torch.unique(labels)) if ways is None else ways
        C_reg = self.C_reg if C_reg is None else C_reg
        max_iters = self.max_iters if max_iters is None else max_iters
        self.qp_solution = _solution(support, labels, self.ways, C_reg, max_iters)
        self.support = support
        self.num_support = support.size(0)

    @staticmethod
    def normalize(x: Tensor, epsilon: float = EPS) -> Tensor:
        """`x / (|x| + epsilon)` by rows."""
        return x / (x.norm(p=2, dim=1, keepdim=True) + epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[Q, ways]` of features `[Q, D]`."""
        if self._normalize:
            x = self.normalize(x)
        return x @ self.support.t() @ self.qp_solution
