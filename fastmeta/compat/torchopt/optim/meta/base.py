"""`torchopt.optim.meta.base`: steps of a module in place of its parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastmeta.functional.second_order import differentiate

from ...base import GradientTransformation, UninitializedState
from ...update import apply_updates


def extract_module_containers(
    module: nn.Module, with_buffers: bool = True
) -> tuple[tuple[dict, ...], tuple[dict, ...]]:
    """The dicts in which a module and its submodules keep their parameters and buffers, as far as they hold any."""
    parts = list(module.modules())
    buffers = tuple(part._buffers for part in parts if part._buffers) if with_buffers else ()
    return tuple(part._parameters for part in parts if part._parameters), buffers


class MetaOptimizer:
    """Steps of any transformation of gradients, on a module.

    Args:
        module: what is stepped; more can be added by `add_param_group`.
        impl: such as `torchopt.adam(...)` or a chain.
    """

    def __init__(self, module: nn.Module, impl: GradientTransformation):
        if not isinstance(impl, GradientTransformation):
            raise TypeError(f"{impl} (type: {type(impl).__name__}) is not a GradientTransformation")
        self.impl = impl
        self.param_containers_groups: list[tuple[dict, ...]] = []
        self.state_groups: list[Any] = []
        self.add_param_group(module)

    def step(self, loss: Tensor) -> None:
        """One step down `loss`. What it does not depend on stays as it is."""
        for i, (containers, state) in enumerate(zip(self.param_containers_groups, self.state_groups, strict=True)):
            places = [(c, name) for c in containers for name, p in c.items() if p is not None]
            params = tuple(c[name] for c, name in places)
            if isinstance(state, UninitializedState):
                state = self.impl.init(params)
            grads = differentiate(loss, params, create_graph=True, allow_unused=True)
            updates, self.state_groups[i] = self.impl.update(grads, state, params=params, inplace=False)
            for (container, name), p in zip(places, apply_updates(params, updates, inplace=False), strict=True):
                container[name] = p

    def add_param_group(self, module: nn.Module) -> None:
        self.param_containers_groups.append(extract_module_containers(module, with_buffers=False)[0])
        self.state_groups.append(UninitializedState())

    def state_dict(self) -> tuple:
        """The states of the groups, by reference."""
        return tuple(self.state_groups)

    def load_state_dict(self, state_dict: Any) -> None:
        self.state_groups[:] = list(state_dict)
