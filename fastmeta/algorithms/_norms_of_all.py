"""Batch norms over the rows of all processes that train together, as if one process had all of the batch's tasks.

A learner whose encoder sees the rows of all tasks at once asks `norms_of_all` for how to call it; `Trainer` says in
which processes (`spanning`). Norms in an inner loop see one task's rows and know nothing of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_current: ContextVar[NormsOfAll | None] = ContextVar("fastmeta.norms_of_all", default=None)


class NormsOfAll(TorchFunctionMode):
    """Inside, `F.batch_norm` in train mode uses the statistics of all ranks' rows, whichever module calls it.

    All ranks must call the same norms in the same order, once each step backward at most.

    Args: rank, world: this process of all. add: sums a tensor over the ranks, in place, and returns it. weight: what
        this rank's gradients are multiplied with before they are summed over the ranks; 1 if its loss is already.
    """

    def __init__(self, rank: int, world: int, add: Callable[[Tensor], Tensor], weight: float):
        super().__init__()
        self.rank, self.world, self.add, self.weight = rank, world, add, weight

    def __torch_function__(self, func, types, args=(), kwargs=None):
        run = self._batch_norm if func is F.batch_norm else func
        return run(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, squares, count = self._moments(wide)
        if running_mean is not None:
            with torch.no_grad():
                running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
                running_var.mul_(1 - momentum).add_(squares / (count - 1), alpha=momentum)
        scale = (squares / count + eps).rsqrt()
        scale = scale if weight is None else scale * weight
        y = (wide - _by_channel(mean, x)) * _by_channel(scale, x)
        return (y if bias is None else y + _by_channel(bias, x)).to(x.dtype)

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of all ranks' rows: their means `[C]`, the sums of squared differences from these `[C]`, and their number.

        One exchange of each rank's own three, joined as by Chan, Golub, LeVeque 1983, "Algorithms for Computing the
        Sample Variance": nothing cancels, however large the means are.
        """
        channels, dims = x.shape[1], [0, *range(2, x.dim())]
        mean = x.mean(dims)
        squares = (x - _by_channel(mean, x)).square().sum(dims)
        count = mean.new_tensor([x.numel() // channels])
        found = _OfAllRanks.apply(torch.cat([mean, squares, count]), self)
        means, squares, counts = found.split([channels, channels, 1], 1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        return mean, (squares + counts * (means - mean).square()).sum(0), count


class _OfAllRanks(torch.autograd.Function):
    """`[world, n]` of every rank's numbers `[n]`."""

    @staticmethod
    def forward(ctx, own: Tensor, norms: NormsOfAll) -> Tensor:
        ctx.norms = norms
        rows = own.new_zeros(norms.world, len(own))
        rows[norms.rank] = own
        return norms.add(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        # The losses of all ranks depend on this one's numbers, each with its weight; this one's comes once more later.
        norms = ctx.norms
        return norms.add(gradient * norms.weight)[norms.rank] / norms.weight, None


def _by_channel(numbers: Tensor, x: Tensor) -> Tensor:
    return numbers.view(-1, *[1] * (x.dim() - 2))


@contextlib.contextmanager
def spanning(norms: NormsOfAll) -> Iterator[None]:
    """Inside, `norms_of_all` gives `norms`."""
    before = _current.set(norms)
    try:
        yield
    finally:
        _current.reset(before)


def norms_of_all() -> NormsOfAll | None:
    """What to call an encoder of all tasks' rows in; None where this process has all of them."""
    return _current.get()
