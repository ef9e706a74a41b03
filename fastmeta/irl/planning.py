"""Finite-horizon planning in many deterministic tabular worlds at once. A return is the sum of the rewards of the cells
that one moves to; `next` `[cells, moves]` is where a move leads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def soft_policy(rewards: Tensor, next: Tensor, horizon: int) -> Tensor:
    """Log-probabilities `[T, horizon, cells, moves]` of the maximum-entropy policy for rewards `[T, cells]`: a
    trajectory has probability proportional to `exp(return)` among those from its start (Ziebart et al. 2008)."""
    value, policies = torch.zeros_like(rewards), []
    for _ in range(horizon):
        scores = (rewards + value)[:, next]
        value = scores.logsumexp(-1)
        policies.append(scores - value.unsqueeze(-1))
    return torch.stack(policies[::-1], 1)


def walk(
    log_policy: Callable[[int, Tensor], Tensor],
    next: Tensor,
    start: Tensor,
    horizon: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Moves taken and cells reached, `[T, n, horizon]` each, of n random walks from `start` `[T, n]`.
    `log_policy(time, cell [T, n])` gives log-probabilities `[T, n, moves]`."""
    cell, moves, cells = start, [], []
    for time in range(horizon):
        probability = log_policy(time, cell).exp()
        move = torch.multinomial(probability.flatten(0, 1), 1, generator=generator).view(cell.shape)
        cell = next[cell, move]
        moves.append(move)
        cells.append(cell)
    return torch.stack(moves, 2), torch.stack(cells, 2)


def best_moves(rewards: Tensor, next: Tensor, horizon: int) -> Tensor:
    """The best policy's moves `[T, horizon, cells]`, by value iteration."""
    value, moves = torch.zeros_like(rewards), []
    for _ in range(horizon):
        value, move = (rewards + value)[:, next].max(-1)
        moves.append(move)
    return torch.stack(moves[::-1], 1)


def value_of(moves: Tensor, rewards: Tensor, next: Tensor) -> Tensor:
    """Return `[T, cells]` from each start of a policy's `moves` `[T, horizon, cells]`."""
    value = torch.zeros_like(rewards)
    for move in reversed(moves.unbind(1)):
        reached = next.expand(len(move), -1, -1).gather(2, move.unsqueeze(2)).squeeze(2)
        value = (rewards + value).gather(1, reached)
    return value


def value_of_chance(rewards: Tensor, next: Tensor, horizon: int) -> Tensor:
    """Expected return `[T, cells]` from each start of uniformly random moves."""
    value = torch.zeros_like(rewards)
    for _ in range(horizon):
        value = (rewards + value)[:, next].mean(-1)
    return value
