"""Linear and bilinear layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.compat.torchmeta.modules.module import MetaModule, beside, weight_and_bias


class MetaLinear(nn.Linear, MetaModule):
    """`torch.nn.Linear`; with a weight `[T, O, I]` it takes `[T, ..., I]`, or `[B, I]` shared by the tasks."""

    def forward(self, input: Tensor, params: Mapping[str, Tensor] | None = None) -> Tensor:
        weight, bias = weight_and_bias(self, params)
        shared_bias = bias is None or bias.dim() == 1
        if weight.dim() == 2 and shared_bias:
            return F.linear(input, weight, bias)
        if weight.dim() == 2:
            out = F.linear(input, weight)
        else:
            # between the task and its rows there may be more dimensions
            rows = weight.mT if input.dim() <= 3 else beside(weight.mT, input)
            out = torch.matmul(input, rows)
        if bias is None:
            return out
        return out + (bias if shared_bias else beside(bias, out))


class MetaBilinear(nn.Bilinear, MetaModule):
    """`torch.nn.Bilinear`; with a weight `[T, O, I1, I2]` it takes inputs `[T, ..., I1]` and `[T, ..., I2]`."""

    def forward(self, input1: Tensor, input2: Tensor, params: Mapping[str, Tensor] | None = None) -> Tensor:
        weight, bias = weight_and_bias(self, params)
        if weight.dim() == 3:
            return F.bilinear(input1, input2, weight, bias)
        out = torch.einsum("t...i,toij,t...j->t...o", input1, weight, input2)
        if bias is None:
            return out
        return out + (bias if bias.dim() == 1 else beside(bias, out))
