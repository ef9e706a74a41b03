"""Layers whose matrices are Kronecker products of two small ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def kronecker_addmm(
    mat1: Tensor, mat2: Tensor, mat3: Tensor, bias: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """`alpha * mat1 @ mat3 @ mat2 + beta * bias`: the Kronecker product of `mat2.t()` and `mat1`, times the columns of
    `mat3` in a row."""
    product = (mat1 @ mat3 @ mat2) * alpha
    return product if bias is None else product.add(bias, alpha=beta)


class KroneckerLinear(nn.Module):
    """`y = left @ x @ right + bias` of matrices `x` `[..., n, m]`, first the identity.

    A vector `[n * m]` is taken as the columns of such a matrix in a row, and returned so.

    Args:
        n, m: sizes of `left` `[n, n]` and `right` `[m, m]`.
        bias: whether there is a `bias` `[n, m]`; True by default.
        psd: `left^T left` and `right^T right` in their places, so that the whole matrix is positive semi-definite;
            False by default.
        device: where the parameters lie; inputs are brought there, and outputs back.

    Raises:
        ValueError: an input of another shape.
    """

    def __init__(self, n: int, m: int, bias: bool = True, psd: bool = False, device=None):
        super().__init__()
        self.left = nn.Parameter(torch.eye(n, device=device))
        self.right = nn.Parameter(torch.eye(m, device=device))
        self.bias = nn.Parameter(torch.zeros(n, m, device=device)) if bias else None
        self.psd = psd
        self.device = device

    def forward(self, x: Tensor) -> Tensor:
        came_from = x.device
        if self.device is not None:
            x = x.to(self.device)
        left, right = self.left, self.right
        if self.psd:
            left, right = left.t() @ left, right.t() @ right
        n, m = self.left.size(0), self.right.size(0)
        if x.dim() == 1:
            if x.size(0) != n * m:
                raise ValueError("Input vector must have size n*m")
            return kronecker_addmm(left, right, x.reshape(m, n).t(), self.bias).t().flatten().to(came_from)
        if x.shape[-2:] != (n, m):
            raise ValueError("Final two dimensions of input tensor must have shape (n, m)")
        return kronecker_addmm(left, right, x, self.bias).to(came_from)


class KroneckerRNN(nn.Module):
    """`h' = sigma(W_h x + U_h h)`, `y = W_y h'`, each matrix a `KroneckerLinear(n, m)`; returns `(y, h')`.

    Args:
        n, m, bias: as in `KroneckerLinear`.
        sigma: the activation; default tanh.
    """

    def __init__(self, n: int, m: int, bias: bool = True, sigma=None):
        super().__init__()
        self.W_h = KroneckerLinear(n, m, bias=bias)
        self.U_h = KroneckerLinear(n, m, bias=bias)
        self.W_y = KroneckerLinear(n, m, bias=bias)
        self.sigma = nn.Tanh() if sigma is None else sigma

    def forward(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.sigma(self.W_h(x) + self.U_h(hidden))
        return self.W_y(hidden), hidden


class KroneckerLSTM(nn.Module):
    """An LSTM cell whose matrices are `KroneckerLinear(n, m)`: `(h, (h, c))` of `x` and `(h, c)`.

    Args:
        n, m, bias: as in `KroneckerLinear`.
        sigma: the gates' activation; default sigmoid.
    """

    def __init__(self, n: int, m: int, bias: bool = True, sigma=None):
        super().__init__()
        for gate in "ifgo":
            for source in "ih":
                setattr(self, f"W_{source}{gate}", KroneckerLinear(n, m, bias=bias))
        self.sigma = nn.Sigmoid() if sigma is None else sigma
        self.tanh = nn.Tanh()

    def forward(self, x: Tensor, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, c = hidden
        i = self.sigma(self.W_ii(x) + self.W_hi(h))
        f = self.sigma(self.W_if(x) + self.W_hf(h))
        g = self.tanh(self.W_ig(x) + self.W_hg(h))
        o = self.sigma(self.W_io(x) + self.W_ho(h))
        c = f * c + i * g
        h = o * self.tanh(c)
        return h, (h, c)
