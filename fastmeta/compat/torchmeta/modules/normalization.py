"""Layer norm."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.compat.torchmeta.modules.module import MetaModule, beside


class MetaLayerNorm(nn.LayerNorm, MetaModule):
    """`torch.nn.LayerNorm`; with a weight or bias `[T, *normalized_shape]` it takes `[T, ..., *normalized_shape]`."""

    def forward(self, input: Tensor, params: Mapping[str, Tensor] | None = None) -> Tensor:
        if params is None:
            weight, bias = self.weight, self.bias
        else:
            weight, bias = params.get("weight"), params.get("bias")
        dims = len(self.normalized_shape)
        if all(parameter is None or parameter.dim() == dims for parameter in (weight, bias)):
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
        out = F.layer_norm(input, self.normalized_shape, None, None, self.eps)
        if weight is not None:
            out = out * (weight if weight.dim() == dims else beside(weight, out))
        if bias is not None:
            out = out + (bias if bias.dim() == dims else beside(bias, out))
        return out
