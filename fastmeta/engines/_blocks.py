"""Norm, activation and pool, as a module calls them one after the other, run in one pass.

What a norm gives is not computed before somebody asks for its numbers: if an activation or a pool asks, it joins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..functional.autocast import cast
from ..ops import norm_act_pool as op
from ._task_tensor import TaskTensor, _seen_as, refuse_own_gradients


class Block(NamedTuple):
    """What stands before the numbers: arguments of `norm_act_pool`, whose images are channels last."""

    x: Tensor  # [T, B, H, W, C]
    weight: tuple[Tensor, ...] = ()
    bias: tuple[Tensor, ...] = ()
    moments: tuple[Tensor, ...] = ()
    norm: str = "none"
    groups: int = 1
    eps: float = 0.0
    activation: str = "identity"
    slope: float = 0.0
    pool: str = "none"

    def run(self) -> Tensor:
        affine = (*self.weight, *self.bias)
        x, *affine = cast("widest", self.x, *affine) if affine else [self.x]
        weight, bias = affine[: len(self.weight)], affine[len(self.weight) :]
        return op.SPEC(x, weight, bias, list(self.moments), *self[4:])

    @property
    def monotone(self) -> bool:
        """Whether the activation may as well come after a pool of the largest."""
        return self.activation == "identity" or self.activation == "relu" and self.slope >= 0

    def activated(self, activation: str, slope: float) -> Block | None:
        """With the activation behind all that is there; None where that is another thing."""
        after = self._replace(activation=activation, slope=slope)
        if self.activation != "identity" or self.pool == "average" or self.pool == "max" and not after.monotone:
            return None
        return after

    def pooled(self, pool: str) -> Block | None:
        return self._replace(pool=pool) if self.pool == "none" else None


class BlockTensor(TaskTensor):
    """What a block gives, seen in `shape`, once somebody asks."""

    block: Block

    @staticmethod
    def __new__(cls, block: Block, shape: torch.Size) -> BlockTensor:
        tensors = (block.x, *block.weight, *block.bias)
        made = _seen_as(cls, shape, next((t for t in tensors if t.requires_grad), block.x))
        made._values, made.block = None, block
        return made

    @property
    def values(self) -> Tensor:
        refuse_own_gradients(self)
        if self._values is None:
            y = self.block.run().movedim(-1, 2)
            self._values = y.reshape(y.shape[0], *self.shape)
        return self._values


def pending(x: TaskTensor) -> Block | None:
    """The block that may be added to, if `x` comes of one."""
    return x.block if type(x) is BlockTensor and x._values is None else None


def channels_last(values: Tensor) -> Tensor:
    """`[T, B, C, *space]` with up to two dimensions of space, as `[T, B, H, W, C]`, a view where it can be one."""
    while values.dim() < 5:
        values = values.unsqueeze(3)
    return values.movedim(2, -1)
