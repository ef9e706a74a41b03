"""Meta-curvature: a learned matrix for each side of a parameter, on its gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MetaCurvatureTransform(nn.Module):
    """The transform of one parameter's gradient (Park and Oliva 2019, "Meta-Curvature"), first the identity.

    Of a bias `[n]`: times `mc` `[n]`. Of a linear weight `[n, m]`: `mc_in @ grad @ mc_out`. Of a 2-d convolution's
    weight `[n, m, h, w]`: `mc_in` `[n, n]`, `mc_out` `[m, m]` (from the right) and `mc_f` `[hw, hw]` on its sides. Made
    in the parameter's dtype and on its device, where 0.2.0 makes matrices in torch's default.

    Args:
        param: the parameter.
        lr: what the result is multiplied with; 1.0 by default, not learned.

    Raises:
        NotImplementedError: a parameter of another number of dimensions.
    """

    def __init__(self, param: Tensor, lr: float = 1.0):
        super().__init__()
        self.lr = lr
        shape = tuple(param.shape)
        self.dim = len(shape)

        def identity(size: int) -> nn.Parameter:
            return nn.Parameter(torch.eye(size, dtype=param.dtype, device=param.device))

        if self.dim == 1:
            self.mc = nn.Parameter(torch.ones_like(param))
        elif self.dim == 2:
            self.mc_in, self.mc_out = identity(shape[0]), identity(shape[1])
        elif self.dim == 4:
            self.n_in, self.n_out, self.n_f = shape[0], shape[1], shape[2] * shape[3]
            self.mc_in, self.mc_out, self.mc_f = identity(self.n_in), identity(self.n_out), identity(self.n_f)
        else:
            raise NotImplementedError("Parameter with shape", param.shape, "is not supported by MetaCurvature.")

    def forward(self, grad: Tensor) -> Tensor:
        if self.dim == 1:
            return self.lr * (self.mc * grad)
        if self.dim == 2:
            return self.lr * (self.mc_in @ grad @ self.mc_out)
        sides = torch.einsum("iof,op->ipf", grad.flatten(2), self.mc_out)
        sides = sides @ self.mc_f.t()
        return self.lr * (self.mc_in @ sides.flatten(1)).view(grad.shape)
