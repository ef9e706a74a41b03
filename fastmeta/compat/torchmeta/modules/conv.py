"""Convolutions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.compat.torchmeta.modules.module import MetaModule, weight_and_bias
from fastmeta.functional import task_conv1d, task_conv2d


class _MetaConv(MetaModule):
    """With a weight `[T, O, C / groups, ...]` it takes `[T, B, C, ...]`, or `[B, C, ...]` shared by the tasks."""

    def forward(self, input: Tensor, params: Mapping[str, Tensor] | None = None) -> Tensor:
        weight, bias = weight_and_bias(self, params)
        if weight.dim() == self.weight.dim():
            return self._conv_forward(input, weight, bias)
        x = input if input.dim() == weight.dim() else input.unsqueeze(0)
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x.flatten(0, 1), self._reversed_padding_repeated_twice, mode=self.padding_mode)
            x, padding = x.unflatten(0, (-1, input.shape[-weight.dim() + 1])), 0
        bias = bias.unsqueeze(0) if bias is not None and bias.dim() == 1 else bias
        return self._of_tasks(x, weight, bias, padding)

    def _of_tasks(self, x: Tensor, weight: Tensor, bias: Tensor | None, padding) -> Tensor:
        conv = {3: task_conv1d, 4: task_conv2d}[self.weight.dim()]
        # torch holds tuples, of one element in one dimension
        one = self.weight.dim() == 3
        stride, padding, dilation = (
            size[0] if one and isinstance(size, tuple) else size for size in (self.stride, padding, self.dilation)
        )
        return conv(x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=self.groups)


class MetaConv1d(_MetaConv, nn.Conv1d):
    __doc__ = f"`torch.nn.Conv1d`. {_MetaConv.__doc__}"


class MetaConv2d(_MetaConv, nn.Conv2d):
    __doc__ = f"`torch.nn.Conv2d`. {_MetaConv.__doc__}"


class MetaConv3d(_MetaConv, nn.Conv3d):
    __doc__ = f"`torch.nn.Conv3d`. {_MetaConv.__doc__}"

    def _of_tasks(self, x: Tensor, weight: Tensor, bias: Tensor | None, padding) -> Tensor:
        def one_task(x, weight, bias):
            return F.conv3d(x, weight, bias, self.stride, padding, self.dilation, self.groups)

        tasks = weight.shape[0]
        in_dims = (0, 0, None if bias is None else 0)
        bias = None if bias is None else bias.expand(tasks, -1)
        return torch.func.vmap(one_task, in_dims)(x.expand(tasks, *x.shape[1:]), weight, bias)
