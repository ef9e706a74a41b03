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


class PixelTensor(TaskTensor):
    """What a kernel gives, `pixels` `[T, B, H, W, C]`, seen in `shape`, in torch's order of dimensions.

    The next kernel takes the pixels as they are: an order of dimensions that nobody asks for costs the graph nothing.
    """

    pixels: Tensor
    graph: bool  # whether gradients were on where the module called for it

    @staticmethod
    def __new__(cls, pixels: Tensor, shape: torch.Size) -> PixelTensor:
        made = _seen_as(cls, shape, pixels)
        made._values, made.pixels, made.graph, made.kept = None, pixels, torch.is_grad_enabled(), False
        return made

    @property
    def values(self) -> Tensor:
        refuse_own_gradients(self)
        if self._values is None:
            with torch.set_grad_enabled(self.graph):
                y = self.pixels.movedim(-1, 2)
                self._values = y.reshape(y.shape[0], *self.shape)
        return self._values


class BlockTensor(PixelTensor):
    """What a block gives, computed once somebody asks."""

    pending: Pending

    @staticmethod
    def __new__(cls, pending: Pending, shape: torch.Size) -> BlockTensor:
        tensors = (pending.block.pixels, *pending.block.weight, *pending.block.bias)
        made = _seen_as(cls, shape, next((t for t in tensors if t.requires_grad), tensors[0]))
        made._values, made._pixels, made.pending, made.kept = None, None, pending, False
        made.graph = torch.is_grad_enabled()
        return made

    @property
    def pixels(self) -> Tensor:
        if self._pixels is None:
            with torch.set_grad_enabled(self.graph):
                self._pixels = self.pending.block.run(self.pending.follow)
        return self._pixels


def pixels_of(x: Tensor) -> Tensor:
    """`[T, B, H, W, C]` of images or, one pixel high, of sequences; with a leading 1 where the tasks share them."""
    if isinstance(x, PixelTensor) and x._values is None:
        refuse_own_gradients(x)
        return x.pixels
    values = x.values if isinstance(x, TaskTensor) else x.unsqueeze(0)
    return (values if values.dim() == 5 else values.unsqueeze(3)).movedim(2, -1)


def pending(x: TaskTensor) -> Pending | None:
    """The block that may be added to, if `x` comes of one, has not run, and gradients are on or off as they were."""
    if type(x) is not BlockTensor or x._values is not None or x._pixels is not None:
        return None
    return x.pending if x.graph == torch.is_grad_enabled() else None
