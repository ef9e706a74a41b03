"""Gridworlds whose cells have colours, and whose colours please or hurt differently in every task."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import values
from ..batch import TaskBatch
from ._arguments import check_demonstration, check_rewards, check_worlds
from .maxent import TabularMaxEntLoss, visits
from .planning import best_moves, soft_policy, value_of, value_of_chance, walk

_MOVES = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))
_SHARPNESS = 1.0  # of the proposals that walk to a cell: log-odds per step nearer


class Worlds(NamedTuple):
    """T gridworlds: features `[T, cells, F]` that an agent sees, rewards `[T, cells]` that it does not."""

    features: Tensor
    rewards: Tensor


class GridworldTasks:
    """Reward learning from demonstrations in a distribution of gridworlds.

    A cell has one of `colours`; of these one attracts (`strength`), one repels (`-strength`) and the others are
    nothing, drawn anew for each task, as is the map. The features of a cell are a fixed random code of its colour and
    noise, so that a learner has to find out what to look at: over many tasks it can. The demonstrator follows the
    maximum-entropy policy of the true rewards from a random cell for `horizon` moves. Moves are deterministic: stay,
    or one of four directions; at the border one stays. Tasks carry no labels: rewards are for judging only.

    Args:
        size: cells on a side. colours, code, distractors: number of colours, width of their code, features of noise.
        strength: of a reward, in units of the demonstrator's temperature. horizon: H, moves.
        demonstrations: d, in the support set and, others, in the query set. samples: M, per demonstration.
        device: where everything lies. seed: of the code, which all tasks share.

    Proposals are a mixture: half uniform moves, half walks towards a random cell; their `log q` is exact.
    `sample` gives inputs `[T, cells + 1, F]` and targets `[T, cells + 1, d (1 + M)]`, as `TabularMaxEntLoss` takes
    them.
    """

    kind = "regression"
    output_size = 1

    def __init__(
        self,
        *,
        size: int = 6,
        colours: int = 6,
        code: int = 8,
        distractors: int = 8,
        strength: float = 2.0,
        horizon: int = 10,
        demonstrations: int = 5,
        samples: int = 16,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ):
        values.count("size", size, 2)
        values.count("colours", colours, 3)
        for name, value in (("code", code), ("horizon", horizon), ("demonstrations", demonstrations)):
            values.count(name, value)
        values.count("distractors", distractors, 0)
        strength = values.number("strength", strength)
        values.seed("seed", seed)
        self.loss = TabularMaxEntLoss(samples)
        self.size, self.colours, self.distractors, self.strength = size, colours, distractors, strength
        self.horizon, self.samples, self.demonstrations = horizon, samples, demonstrations
        self.device = values.device("device", device)
        generator = torch.Generator().manual_seed(seed)
        self.code = torch.randn(colours, code, generator=generator).to(self.device)
        row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        cells = torch.stack([row, column], -1).reshape(-1, 1, 2)
        there = (cells + torch.tensor(_MOVES)).clamp(0, size - 1)
        self.next = (there[..., 0] * size + there[..., 1]).to(self.device)  # [cells, moves]
        far = (there.unsqueeze(0) - cells.view(-1, 1, 1, 2)).abs().sum(-1)  # [goal, cell, move]
        walks = torch.log_softmax(-_SHARPNESS * far.float(), -1)
        uniform = torch.full_like(walks[:1], 1 / len(_MOVES)).log()
        self._policies = torch.cat([uniform, walks]).to(self.device)  # [1 + cells, cells, moves]
        goals = size * size
        self._mixture = torch.tensor([0.5] + [0.5 / goals] * goals, device=self.device)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.code.shape[1] + self.distractors,)

    def worlds(self, num_tasks: int, *, generator: torch.Generator | None = None) -> Worlds:
        """New tasks, and what is hidden in them."""
        values.count("num_tasks", num_tasks, 0)
        values.generator("generator", generator, self.device)
        drawn = {"device": self.device, "generator": generator}
        cells = self.size**2
        colour = torch.randint(self.colours, (num_tasks, cells), **drawn)
        order = torch.rand(num_tasks, self.colours, **drawn).argsort(1)  # the first attracts, the second repels
        pleasure = (order == 0).float() - (order == 1).float()
        noise = torch.randn(num_tasks, cells, self.distractors, **drawn)
        return Worlds(torch.cat([self.code[colour], noise], 2), self.strength * pleasure.gather(1, colour))

    def demonstrate(
        self, worlds: Worlds, demonstrations: int, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Inputs and targets, as of `sample`, of `demonstrations` new demonstrations in each world."""
        check_demonstration(worlds, Worlds, demonstrations, generator, self.device)
        tasks, cells = worlds.rewards.shape
        drawn = {"device": self.device, "generator": generator}
        start = torch.randint(cells, (tasks, demonstrations), **drawn)
        policy = soft_policy(worlds.rewards, self.next, self.horizon)

        def demonstrator(time: int, cell: Tensor) -> Tensor:
            return policy[:, time].gather(1, cell.unsqueeze(2).expand(-1, -1, policy.shape[3]))

        _, shown = walk(demonstrator, self.next, start, self.horizon, generator)
        # the proposals of all demonstrations, one after the other: [T, d M, H]
        start = start.repeat_interleave(self.samples, 1)
        trajectories = max(start.numel(), 1)  # none would be refused
        number = torch.multinomial(self._mixture, trajectories, replacement=True, generator=generator)
        number = number[: start.numel()].view(start.shape)
        moves, visited = walk(lambda _, cell: self._policies[number, cell], self.next, start, self.horizon, generator)
        left = torch.cat([start.unsqueeze(2), visited[:, :, :-1]], 2)
        by_policy = self._policies[:, left, moves].sum(-1) + self._mixture.log()[:, None, None]
        log_q = by_policy.logsumexp(0).unflatten(1, (demonstrations, self.samples))

        targets = visits(cells, shown, visited.unflatten(1, (demonstrations, self.samples)), log_q)
        return torch.nn.functional.pad(worlds.features, (0, 0, 0, 1)), targets

    def sample(self, num_tasks: int, *, generator: torch.Generator | None = None) -> TaskBatch:
        """`num_tasks` tasks, drawn with `generator` (of the device) or the global one."""
        worlds = self.worlds(num_tasks, generator=generator)
        support = self.demonstrate(worlds, self.demonstrations, generator=generator)
        return TaskBatch(*support, *self.demonstrate(worlds, self.demonstrations, generator=generator))

    def states(self, worlds: Worlds, *, generator: torch.Generator | None = None) -> Tensor:
        """What a learned reward is asked for, to judge it: all cells, `[T, cells, F]`."""
        return worlds.features

    def value_difference(self, worlds: Worlds, rewards: Tensor, states: Tensor | None = None) -> Tensor:
        """How much worse than the best policy that of learned `rewards` `[T, cells, 1]` does, by the true rewards and
        from a uniform start: 0 for the best, 1 for random moves. `[T]`"""
        check_worlds(worlds, Worlds)
        check_rewards(rewards, worlds.rewards.shape)
        true = worlds.rewards
        learned = best_moves(rewards.squeeze(-1), self.next, self.horizon)
        best = value_of(best_moves(true, self.next, self.horizon), true, self.next).mean(1)
        chance = value_of_chance(true, self.next, self.horizon).mean(1)
        return (best - value_of(learned, true, self.next).mean(1)) / (best - chance).clamp_min(1e-6)
