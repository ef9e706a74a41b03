"""A chain of modules."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fastmeta.compat.torchmeta.modules.module import MetaModule


class MetaSequential(nn.Sequential, MetaModule):
    """`torch.nn.Sequential`, whose `MetaModule`s get their part of `params` and whose other modules keep their own."""

    def forward(self, input: Tensor, params: Mapping[str, Tensor] | None = None) -> Tensor:
        for name, module in self._modules.items():
            if isinstance(module, MetaModule):
                input = module(input, params=self.get_subdict(params, name))
            elif isinstance(module, nn.Module):
                input = module(input)
            else:
                raise TypeError(f"`{name}` must be a `torch.nn.Module` or a `MetaModule`, got {type(module)}")
        return input
