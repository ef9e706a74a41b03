"""A point in the plane that is drawn to one place and kept off another, both elsewhere in every task."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import values
from ..batch import TaskBatch
from ._arguments import check_demonstration, check_rewards, check_worlds
from .maxent import MaxEntLoss, rows


class Plane(NamedTuple):
    """T tasks: where it is good to be, and where it is not, `[T, 2]` each."""

    goal: Tensor
    hazard: Tensor


class PointMassTasks:
    """Reward learning from demonstrations of a point mass with velocity control, in continuous states and actions.

    Position `p <- p + a`, `horizon` times from a random start in [-1, 1]^2. The reward is a hill at the goal less one
    at the hazard, `strength` high and `width` wide. Uncontrolled, actions follow passive dynamics `q0`: a random
    velocity, plus noise in each step. Trajectories have density proportional to `q0(tau) exp(R(tau))`, the
    maximum-entropy model of continuous states (Aghasadeghi and Bretl 2011, "Maximum Entropy Inverse Reinforcement
    Learning in Continuous State Spaces with Path Integrals"); demonstrations are drawn from it by resampling
    `candidates` trajectories of `q0`.

    Proposals have twice the velocity and noise of `q0`, and targets carry `log q - log q0`, which is exact: both are
    Gaussian.

    Args:
        horizon: H. strength: in units of the demonstrator's temperature. width: standard deviation of a hill.
        velocity, noise: standard deviations of `q0`.
        demonstrations, samples, device: as of `GridworldTasks`; 5 and 12 by default. candidates: of the demonstrator
        and of the planner. starts: from which a policy is judged. By default 128 candidates and 8 starts.

    `sample` gives inputs `[T, S, 2]`, positions, and targets `[T, S, 1]`, as `MaxEntLoss` takes them.
    """

    kind = "regression"
    output_size = 1
    input_shape = (2,)

    def __init__(
        self,
        *,
        horizon: int = 8,
        strength: float = 2.0,
        width: float = 0.4,
        velocity: float = 0.15,
        noise: float = 0.05,
        demonstrations: int = 5,
        samples: int = 12,
        candidates: int = 128,
        starts: int = 8,
        device: str | torch.device = "cpu",
    ):
        sizes = {"demonstrations": demonstrations, "candidates": candidates, "starts": starts}
        for name, value in sizes.items():
            values.count(name, value)
        strength = values.number("strength", strength)
        for name, value in (("width", width), ("velocity", velocity), ("noise", noise)):
            values.number(name, value, 0, open=True)
        self.loss = MaxEntLoss(samples, horizon)
        self.horizon, self.strength, self.width = horizon, strength, width
        self.velocity, self.noise = velocity, noise
        self.demonstrations, self.samples = demonstrations, samples
        self.candidates, self.starts = candidates, starts
        self.device = values.device("device", device)

    def worlds(self, num_tasks: int, *, generator: torch.Generator | None = None) -> Plane:
        """New tasks, and what is hidden in them."""
        values.count("num_tasks", num_tasks, 0)
        values.generator("generator", generator, self.device)
        return Plane(*(self._uniform(num_tasks, 2, generator=generator) for _ in range(2)))

    def true_rewards(self, worlds: Plane, positions: Tensor) -> Tensor:
        """Of positions `[T, ..., 2]`, `[T, ...]`."""

        def hill(centre: Tensor) -> Tensor:
            centre = centre.view(len(centre), *[1] * (positions.dim() - 2), 2)
            return torch.exp(-(positions - centre).square().sum(-1) / (2 * self.width**2))

        return self.strength * (hill(worlds.goal) - hill(worlds.hazard))

    def demonstrate(
        self, worlds: Plane, demonstrations: int, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Inputs `[T, S, 2]` and targets `[T, S, 1]` of `demonstrations` new demonstrations in each task."""
        check_demonstration(worlds, Plane, demonstrations, generator, self.device)
        start = self._uniform(len(worlds.goal), demonstrations, 2, generator=generator)
        positions, _ = self._passive(start, self.candidates, 1.0, generator)  # [T, d, candidates, H, 2]
        chance = torch.softmax(self.true_rewards(worlds, positions).sum(-1), -1)
        chosen = torch.multinomial(chance.flatten(0, 1), 1, generator=generator).view(*chance.shape[:2], 1, 1, 1)
        shown = positions.gather(2, chosen.expand(-1, -1, 1, self.horizon, 2)).squeeze(2)
        positions, actions = self._passive(start, self.samples, 2.0, generator)
        return rows(shown, positions, self._log_density(actions, 2.0) - self._log_density(actions, 1.0))

    def sample(self, num_tasks: int, *, generator: torch.Generator | None = None) -> TaskBatch:
        """`num_tasks` tasks, drawn with `generator` (of the device) or the global one."""
        worlds = self.worlds(num_tasks, generator=generator)
        support = self.demonstrate(worlds, self.demonstrations, generator=generator)
        return TaskBatch(*support, *self.demonstrate(worlds, self.demonstrations, generator=generator))

    def states(self, worlds: Plane, *, generator: torch.Generator | None = None) -> Tensor:
        """What a learned reward is asked for, to judge it: the planner's candidates, `[T, S, 2]`,
        `S = starts * candidates * H`."""
        start = self._uniform(len(worlds.goal), self.starts, 2, generator=generator)
        return self._passive(start, self.candidates, 1.0, generator)[0].flatten(1, 3)

    def value_difference(self, worlds: Plane, rewards: Tensor, states: Tensor) -> Tensor:
        """How much worse than the best of the candidates that is which learned `rewards` `[T, starts * candidates *
        H, 1]` of `states` pick, by the true rewards: 0 for the best, 1 for a candidate at random. `[T]`"""
        check_worlds(worlds, Plane)
        values.tensor("states", states)
        check_rewards(rewards, (len(worlds.goal), self.starts * self.candidates * self.horizon))
        if states.shape != (*rewards.shape[:2], 2):
            raise ValueError(f"states must have shape [T, S, 2] = {[*rewards.shape[:2], 2]}, got {list(states.shape)}")
        split = (self.starts, self.candidates, self.horizon)
        learned = rewards.squeeze(-1).unflatten(1, split).sum(-1)
        true = self.true_rewards(worlds, states).unflatten(1, split).sum(-1)
        picked = true.gather(2, learned.argmax(2, keepdim=True)).mean((1, 2))
        best, chance = true.amax(2).mean(1), true.mean((1, 2))
        return (best - picked) / (best - chance).clamp_min(1e-6)

    def _uniform(self, *shape: int, generator: torch.Generator | None) -> Tensor:
        return 2 * torch.rand(*shape, device=self.device, generator=generator) - 1

    def _passive(
        self, start: Tensor, number: int, spread: float, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Positions and actions `[..., number, H, 2]` from `start` `[..., 2]`, `spread` times as wild as `q0`."""
        shape = (*start.shape[:-1], number)
        drawn = {"device": self.device, "generator": generator}
        actions = self.velocity * torch.randn(*shape, 1, 2, **drawn)
        actions = spread * (actions + self.noise * torch.randn(*shape, self.horizon, 2, **drawn))
        return start[..., None, None, :] + actions.cumsum(-2), actions

    def _log_density(self, actions: Tensor, spread: float) -> Tensor:
        """Of actions `[..., H, 2]` under `q0` at `spread`: a Gaussian in time, `spread^2 (velocity^2 + noise^2 I)`."""
        noise, velocity = (spread * self.noise) ** 2, (spread * self.velocity) ** 2
        total = noise + self.horizon * velocity
        square = actions.square().sum(-2) / noise - velocity * actions.sum(-2).square() / (noise * total)
        log_volume = (self.horizon - 1) * math.log(noise) + math.log(total) + self.horizon * math.log(2 * math.pi)
        return -0.5 * (square + log_volume).sum(-1)
