"""Tasks of different sizes in one batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """The support or the query rows of `T` tasks, by their places among the examples in order of class."""

    places: Tensor  # int64 [T, S]
    labels: Tensor  # int64 [T, S]
    mask: tuple[Tensor, ...]  # bool [T, S] where tasks differ in size, else nothing

    def only(self, part: slice) -> Part:
        """Of these tasks alone; the widths stay those of all."""
        return Part(self.places[part], self.labels[part], tuple(mask[part] for mask in self.mask))

    def filled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs `[T, S, ...]` of `x` `[T * S, ...]`, which is written to, and labels."""
        x = x.unflatten(0, self.places.shape)
        for mask in self.mask:
            x.masked_fill_(~mask.view(*mask.shape, *[1] * (x.dim() - 2)), 0)
        return x, self.labels


def padded(places: Tensor, sizes: Tensor) -> Part:
    """From the places of all tasks one after the other, ordered by class, and how many are of each class of each task,
    int64 `[T, N]`."""
    (tasks, ways), total = sizes.shape, sizes.sum(1, keepdim=True)
    mask = torch.arange(int(total.max()) if tasks else 0, device=sizes.device) < total
    labels = torch.arange(ways, device=sizes.device).repeat(tasks).repeat_interleave(sizes.flatten())
    empty = torch.zeros(mask.shape, dtype=torch.int64, device=sizes.device)
    return Part(empty.masked_scatter(mask, places), empty.masked_scatter(mask, labels), (mask,))


def others(starts: Tensor, sizes: Tensor, places: Tensor, taken: Tensor) -> Tensor:
    """The places of whole classes, `sizes` `[T, N]` from `starts` `[T, N]` on, less those of `places` `[T, N, K]` that
    are `taken`: of all tasks one after the other, ordered by class."""
    sizes, starts = sizes.flatten(), starts.flatten()
    before = sizes.cumsum(0) - sizes
    shift = starts - before
    free = torch.ones(int(sizes.sum()), dtype=torch.bool, device=sizes.device)
    every = torch.arange(len(free), device=sizes.device) + shift.repeat_interleave(sizes)
    free[(places - shift.view(*places.shape[:2], 1))[taken]] = False
    return every[free]
