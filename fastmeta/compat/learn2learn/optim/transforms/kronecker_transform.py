"""Transforms whose matrices are Kronecker products, of the size of a parameter's sides in place of its elements."""

from __future__ import annotations

from torch import Tensor

from .module_transform import ReshapedTransform


def get_kronecker_dims(param: Tensor) -> tuple[int, int]:
    """`(n, m)` of the matrices that a parameter's gradient is seen as: `[n, m]` of a linear weight, `[n, 1]` of a bias,
    input channels by kernel elements of a 2-d convolution's weight.

    Raises:
        NotImplementedError: a parameter of another number of dimensions.
    """
    shape = tuple(param.shape)
    if len(shape) == 1:
        return shape[0], 1
    if len(shape) == 2:
        return shape
    if len(shape) == 4:
        return shape[1], shape[2] * shape[3]
    raise NotImplementedError("Layer not supported. Please open an issue.")


class KroneckerTransform:
    """Called with a parameter, returns a transform of its gradient by `kronecker_cls(n=, m=, bias=, psd=)`, which sees
    `[-1, n, m]` (Arnold et al. 2019, "When MAML Can Adapt Fast and How to Assist When It Cannot").

    Args:
        kronecker_cls: such as `nn.KroneckerLinear`.
        bias: whether it has one; False by default.
        psd: whether its matrix is positive semi-definite; True by default.
    """

    def __init__(self, kronecker_cls, bias: bool = False, psd: bool = True):
        self.kronecker_cls = kronecker_cls
        self.bias = bias
        self.psd = psd

    def __call__(self, param: Tensor) -> ReshapedTransform:
        n, m = get_kronecker_dims(param)
        return ReshapedTransform(self.kronecker_cls(n=n, m=m, bias=self.bias, psd=self.psd), (-1, n, m))
