"""Norm, activation and pool, as a module calls them one after the other, run in one pass.

What a norm gives is not computed before somebody asks for its numbers: if an activation or a pool asks, it joins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..functional.blocks import Block, Follow
from ._task_tensor import TaskTensor, _seen_as, refuse_own_gradients


class Pending(NamedTuple):
    """A norm, or none, and what follows, before they run."""

    block: Block
    follow: Follow = Follow()

    def with_follow(self, follow: Follow | None) -> Pending | None:
        return None if follow is None else self._replace(follow=follow)


class BlockTensor(TaskTensor):
    """What a block gives, seen in `shape`, once somebody asks."""

    pending: Pending
    graph: bool  # whether gradients were on where the module called for it

    @staticmethod
    def __new__(cls, pending: Pending, shape: torch.Size) -> BlockTensor:
        tensors = (pending.block.pixels, *pending.block.weight, *pending.block.bias)
        made = _seen_as(cls, shape, next((t for t in tensors if t.requires_grad), tensors[0]))
        made._values, made.pending, made.graph, made.kept = None, pending, torch.is_grad_enabled(), False
        return made

    @property
    def values(self) -> Tensor:
        refuse_own_gradients(self)
        if self._values is None:
            with torch.set_grad_enabled(self.graph):
                y = self.pending.block(self.pending.follow)
            self._values = y.reshape(y.shape[0], *self.shape)
        return self._values


def pending(x: TaskTensor) -> Pending | None:
    """The block that may be added to, if `x` comes of one, has not run, and gradients are on or off as they were."""
    if type(x) is not BlockTensor or x._values is not None or x.graph != torch.is_grad_enabled():
        return None
    return x.pending
