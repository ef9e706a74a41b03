"""`MetaModule`, the base of every module that takes `params`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from fastmeta.compat.torchmeta.modules.utils import under


class MetaModule(nn.Module):
    """A module whose `forward` takes `params`, a dict of tensors by name, in place of its own parameters.

    Its meta-parameters are those of itself and of all submodules that are `MetaModule`s too; a plain `torch.nn` layer
    inside keeps its parameters out of adaptation.
    """

    def meta_named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and values of the meta-parameters, as `named_parameters` gives those of all."""
        yield from self._named_members(
            lambda module: module._parameters.items() if isinstance(module, MetaModule) else (),
            prefix=prefix,
            recurse=recurse,
        )

    def meta_parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The meta-parameters without their names."""
        for _, parameter in self.meta_named_parameters(recurse=recurse):
            yield parameter

    def get_subdict(self, params: Mapping[str, Tensor] | None, key: str | None = None) -> Mapping[str, Tensor] | None:
        """What to hand to the submodule `key` of `params`: its entries, under the submodule's own names.

        None where `params` is None, and where no name begins with `key.`, which warns: the submodule then uses its own
        parameters. Without a key all of `params`.
        """
        if params is None or key is None:
            return params
        inside = under(params, key)
        if inside:
            return inside
        warnings.warn(
            f"`params` holds nothing for the submodule `{key}` of `{type(self).__name__}`, which takes its own "
            f"parameters; `params` holds [{', '.join(params)}]",
            stacklevel=2,
        )
        return None


def weight_and_bias(module: nn.Module, params: Mapping[str, Tensor] | None) -> tuple[Tensor, Tensor | None]:
    """A layer's own, or those given, of which the bias may be missing."""
    if params is None:
        return module.weight, module.bias
    return params["weight"], params.get("bias")


def beside(parameter: Tensor, x: Tensor) -> Tensor:
    """A parameter `[T, *shape]` as `[T, 1, ..., 1, *shape]`, to go with `x` `[T, ..., *shape]`."""
    return parameter.reshape(parameter.shape[0], *[1] * (x.dim() - parameter.dim()), *parameter.shape[1:])
