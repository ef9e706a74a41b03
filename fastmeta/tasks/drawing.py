"""Random choices for whole batches of tasks at once: which classes, how many rows of each, and which."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Meta-Dataset's numbers: support rows of a task, those that a class counts for at most, and queries of a class
_LARGEST_SUPPORT, _LARGEST_SHARE, NATURAL_QUERIES = 500, 100, 10
_LOG_WEIGHTS = (math.log(0.5), math.log(2))


def subsets(
    rows: int,
    population: int | Tensor,
    size: int | Tensor,
    *,
    device,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`rows` uniform random subsets of `size` of `range(population)`, in random order, int64 `[rows, size]`.

    Both may be int64 `[rows]`: then row i is a subset of `size[i]` of `range(population[i])`, and -1 from there on.

    Floyd's algorithm (Bentley and Floyd 1987) on all rows at once: `size` steps, whatever the population, and no wait
    for the device but for the largest of sizes that differ.
    """
    ragged, most = isinstance(size, Tensor), _most(size)
    chosen = torch.empty(rows, most, dtype=torch.int64, device=device)
    for i in range(most):
        last = population - size + i
        if isinstance(last, Tensor):
            # in float64 a number below 1 times a whole number below 2^53 stays below it
            draw = torch.rand(rows, dtype=torch.float64, device=device, generator=generator)
            draw = (draw * (last + 1)).long()
        else:
            draw = torch.randint(last + 1, (rows,), device=device, generator=generator)
        taken = (chosen[:, :i] == draw.unsqueeze(1)).any(1)
        chosen[:, i] = torch.where(taken, last, draw)
        if ragged:
            chosen[:, i].masked_fill_(size <= i, -1)
    order = torch.rand(rows, most, device=device, generator=generator)
    if ragged:
        order.masked_fill_(chosen < 0, 2)  # behind all others
    return chosen.gather(1, order.argsort(1))


def subsets_by_weight(
    rows: int, weight: Tensor, size: int, *, device, generator: torch.Generator | None = None
) -> Tensor:
    """As `subsets` of `range(len(weight))`, drawn one after the other with probabilities as `weight` `[population]`
    of those that are left, and in this order.

    The first of independent exponential waiting times with these rates come in that order (Efraimidis and Spirakis
    2006, "Weighted random sampling with a reservoir"): one number for each, and no loop.
    """
    uniform = torch.rand(rows, len(weight), dtype=torch.float64, device=device, generator=generator)
    return (uniform.log_() / weight).topk(size, 1).indices


def with_replacement(
    rows: int, population: int | Tensor, size: int | Tensor, *, device, generator: torch.Generator | None = None
) -> Tensor:
    """As `subsets`, every place drawn by itself, up to the largest size."""
    draw = torch.rand(rows, _most(size), dtype=torch.float64, device=device, generator=generator)
    return (draw * (population.unsqueeze(1) if isinstance(population, Tensor) else population)).long()


def natural_sizes(
    counts: Tensor, there: Tensor, most_queries: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of each class in support and query, as Meta-Dataset draws them; see `EpisodeSampler`.

    Args:
        counts: int64 `[T, N]`, the rows that each class has; at least 2.
        there: bool `[T, N]`, False where a task has fewer than N classes.

    Returns:
        Shots int64 `[T, N]`, and queries int64 `[T, N]`, the same for all classes of a task; 0 for no class.
    """
    drawn = {"dtype": torch.float64, "device": counts.device, "generator": generator}
    half = (counts // 2).masked_fill(~there, most_queries).amin(1, keepdim=True)
    queries = half.clamp(max=most_queries)
    left = counts - queries
    beta = 1 - torch.rand(len(counts), 1, **drawn)  # in (0, 1]
    support = (beta * left.clamp(max=_LARGEST_SHARE)).ceil() * there
    support = support.sum(1, keepdim=True).clamp(max=_LARGEST_SUPPORT)
    low, high = _LOG_WEIGHTS
    weight = (low + (high - low) * torch.rand(counts.shape, **drawn)).exp() * counts * there
    share = weight / weight.sum(1, keepdim=True)
    spare = (support - there.sum(1, keepdim=True)).clamp(min=0)
    shots = ((share * spare).floor().long() + 1).minimum(left)
    return shots * there, queries * there


def _most(size: int | Tensor) -> int:
    if isinstance(size, Tensor):
        return int(size.max()) if len(size) else 0
    return size
