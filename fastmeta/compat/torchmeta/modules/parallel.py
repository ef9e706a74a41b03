"""One module on several GPUs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel.replicate import _broadcast_coalesced_reshape
from torch.nn.parallel.scatter_gather import scatter_kwargs

from fastmeta.compat.torchmeta.modules.module import MetaModule
from fastmeta.compat.torchmeta.modules.utils import under


class DataParallel(nn.DataParallel, MetaModule):
    """`torch.nn.DataParallel`: inputs are split over the GPUs, and every GPU gets all of `params`, whose names are
    those of the module or those of this wrapper, with `module.` before them. On a CPU it calls the module."""

    def forward(self, *inputs, **kwargs):
        if isinstance(self.module, MetaModule) and kwargs.get("params") is not None:
            kwargs["params"] = self._of_the_module(kwargs["params"])
        return super().forward(*inputs, **kwargs)

    @staticmethod
    def _of_the_module(params: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return under(params, "module") or params

    def scatter(self, inputs, kwargs, device_ids):
        params = kwargs.pop("params", None) if isinstance(self.module, MetaModule) else None
        inputs, scattered = scatter_kwargs(inputs, kwargs, device_ids, dim=self.dim)
        if params is None:
            return inputs, scattered
        copies = _broadcast_coalesced_reshape(
            list(params.values()), device_ids[: len(inputs)], detach=not torch.is_grad_enabled()
        )
        scattered = tuple(
            {**kwarg, "params": OrderedDict(zip(params, copy, strict=True))}
            for kwarg, copy in zip(scattered, copies, strict=False)
        )
        return inputs, scattered
