"""`torchopt.optim.func.base`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastmeta.functional.second_order import differentiate

from ...base import GradientTransformation, UninitializedState
from ...update import apply_updates


class FuncOptimizer:
    """`step(loss, params) -> params` of a transformation such as `torchopt.adam(...)`; `inplace` is that of its steps
    where they are not told."""

    def __init__(self, impl: GradientTransformation, *, inplace: bool = False):
        if not isinstance(impl, GradientTransformation):
            raise TypeError(f"{impl} (type: {type(impl).__name__}) is not a GradientTransformation")
        self.impl = impl
        self.optim_state: Any = UninitializedState()
        self.inplace = bool(inplace)

    def step(self, loss: Tensor, params: tuple[Tensor, ...], inplace: bool | None = None) -> tuple[Tensor, ...]:
        """The parameters, a tuple of tensors, after a step down `loss`."""
        if isinstance(self.optim_state, UninitializedState):
            self.optim_state = self.impl.init(params)
        inplace = self.inplace if inplace is None else inplace
        grads = differentiate(loss, params, create_graph=True, allow_unused=True)
        updates, self.optim_state = self.impl.update(grads, self.optim_state, params=params, inplace=inplace)
        return apply_updates(params, updates, inplace=inplace)

    def state_dict(self) -> Any:
        return self.optim_state

    def load_state_dict(self, state_dict: Any) -> None:
        self.optim_state = state_dict
