"""Batch norms."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.compat.torchmeta.modules.module import MetaModule


class _MetaBatchNorm(MetaModule):
    """With a weight or bias `[T, C]` it takes `[T, B, C, ...]`, and each task is normalised by its own statistics; the
    running ones are then what they would be after the tasks one after the other."""

    def forward(self, input: Tensor, params: Mapping[str, Tensor] | None = None) -> Tensor:
        if params is None:
            weight, bias = self.weight, self.bias
        else:
            weight, bias = params.get("weight"), params.get("bias")
        if any(parameter is not None and parameter.dim() == 2 for parameter in (weight, bias)):
            return self._of_tasks(input, weight, bias)
        self._check_input_dim(input)
        (factor,) = self._factors(1)
        return F.batch_norm(
            input, self.running_mean, self.running_var, weight, bias, self._by_batch(), factor, self.eps
        )

    def _by_batch(self) -> bool:
        return self.training or not self.track_running_stats

    def _factors(self, batches: int) -> list[float]:
        """The weight of each new batch in the running statistics; counts the batches."""
        if not (self.training and self.track_running_stats):
            return [self.momentum or 0.0] * batches
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += batches
        if self.momentum is not None:
            return [self.momentum] * batches
        last = float(self.num_batches_tracked)
        return [1.0 / (last - later) for later in reversed(range(batches))]

    def _of_tasks(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        self._check_input_dim(x[0])
        tasks, rows, channels = x.shape[:3]
        channel_of_task = x.transpose(0, 1).reshape(rows, tasks * channels, *x.shape[3:])
        weight, bias = (
            None if parameter is None else parameter.expand(tasks, channels).reshape(-1) for parameter in (weight, bias)
        )
        mean = var = None
        if self.track_running_stats:
            # by momentum 1 these become the tasks' own statistics
            mean, var = self.running_mean.repeat(tasks), self.running_var.repeat(tasks)
        out = F.batch_norm(channel_of_task, mean, var, weight, bias, self._by_batch(), 1.0, self.eps)
        if self.training and self.track_running_stats:
            self._remember(mean.view(tasks, channels), var.view(tasks, channels))
        return out.reshape(rows, tasks, channels, *x.shape[3:]).transpose(0, 1)

    def _remember(self, means: Tensor, variances: Tensor) -> None:
        left, shares = 1.0, []
        for factor in reversed(self._factors(means.shape[0])):
            shares.append(left * factor)
            left *= 1.0 - factor
        shares = torch.tensor(shares[::-1], dtype=means.dtype, device=means.device)
        self.running_mean.mul_(left).add_(shares @ means)
        self.running_var.mul_(left).add_(shares @ variances)


class MetaBatchNorm1d(_MetaBatchNorm, nn.BatchNorm1d):
    __doc__ = f"`torch.nn.BatchNorm1d`. {_MetaBatchNorm.__doc__}"


class MetaBatchNorm2d(_MetaBatchNorm, nn.BatchNorm2d):
    __doc__ = f"`torch.nn.BatchNorm2d`. {_MetaBatchNorm.__doc__}"


class MetaBatchNorm3d(_MetaBatchNorm, nn.BatchNorm3d):
    __doc__ = f"`torch.nn.BatchNorm3d`. {_MetaBatchNorm.__doc__}"
