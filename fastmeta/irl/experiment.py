"""Does meta-learning a reward network pay? The same network, from 1, 5 and 10 demonstrations of a new task:

- *meta*: MAML on the maximum-entropy loss over many tasks, adapted by its inner loop;
- *averaged*: trained on the loss of all tasks at once, without an inner loop, then adapted in the same way;
- *scratch*: not trained before, adapted for many steps.

Steps and step size of all of them, at test time, are those that do best on validation tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .. import values
from ..algorithms import MAML
from ..nn import mlp
from ..training.metrics import Estimate
from .gridworld import GridworldTasks
from .point_mass import PointMassTasks

WORLDS = {"gridworld": GridworldTasks, "pointmass": PointMassTasks}
DEMONSTRATIONS = (1, 5, 10)
# inner steps and rate that meta trains with
INNER = {"gridworld": (1, 0.3), "pointmass": (5, 0.03)}
# and those to choose from at test time
_CHOICES = tuple((steps, rate) for steps in (1, 5, 20) for rate in (0.03, 0.1, 0.3))


def reward_network(tasks) -> nn.Sequential:
    return mlp([tasks.input_shape[0], 32, 32, 1], "tanh")


def train(
    tasks, *, inner_steps: int, inner_lr: float = 0.3, iterations: int = 1000, task_batch: int = 16,
    outer_lr: float = 3e-3, seed: int = 0, progress: Callable[[int], None] = lambda step: None,
) -> MAML:  # fmt: skip
    """MAML on `tasks`, Adam with a rate that falls along a cosine to 0; `inner_steps=0` trains on all tasks at once."""
    torch.manual_seed(seed)
    learner = MAML(reward_network(tasks), loss=tasks.loss, inner_steps=inner_steps, inner_lr=inner_lr).to(tasks.device)
    optimizer = torch.optim.Adam(learner.parameters(), outer_lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    generator = torch.Generator(tasks.device).manual_seed(seed)
    for step in range(iterations):
        optimizer.zero_grad()
        loss = learner(tasks.sample(task_batch, generator=generator)).loss
        if not loss.isfinite():
            raise RuntimeError(f"the loss of step {step} is {loss.item()}: a smaller inner_lr or outer_lr often helps")
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(step + 1)
    return learner


@torch.no_grad()
def judge(learner: MAML, tasks, demonstrations: int, *, num_tasks: int = 200, seed: int = 1) -> Estimate:
    """Value difference on new tasks after adaptation from so many demonstrations: 0 is the best policy, 1 random
    moves."""
    found = []
    generator = torch.Generator(tasks.device).manual_seed(seed)
    for begin in range(0, num_tasks, 25):
        worlds = tasks.worlds(min(25, num_tasks - begin), generator=generator)
        state = learner.adapt(*tasks.demonstrate(worlds, demonstrations, generator=generator))
        states = tasks.states(worlds, generator=generator)
        found.append(tasks.value_difference(worlds, learner.predict(state, states), states))
    return Estimate.of(torch.cat(found))


def tuned(learner: MAML, tasks, demonstrations: int) -> MAML:
    """A copy with the inner steps and rate of `_CHOICES` that do best on validation tasks."""
    copies = []
    for steps, rate in _CHOICES:
        other = copy.deepcopy(learner)
        other.inner_steps, other.inner_lr = steps, rate
        score = judge(other, tasks, demonstrations, num_tasks=25, seed=2).mean
        copies.append((score if score == score else float("inf"), len(copies), other))
    return min(copies)[2]


def experiment(
    world: str, *, iterations: int = 1000, num_tasks: int = 200,
    seed: int = 0, device: str = "cpu", progress: Callable[[str, int], None] = lambda method, step: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One dict per method and number of demonstrations: `world`, `method`, `demonstrations`, `value_difference`.

    Args:
        world: "gridworld" or "pointmass".
        iterations: outer steps of meta and averaged. num_tasks: that each row is judged on.
        progress: takes a method and how many outer steps it has done.

    Raises:
        TypeError, ValueError: an unknown world, a number or device that is none.
    """
    if world not in WORLDS:
        raise ValueError(f"world must be one of {', '.join(WORLDS)}; got {world!r}")
    values.count("iterations", iterations)
    values.count("num_tasks", num_tasks, 2)
    values.seed("seed", seed)
    tasks = WORLDS[world](device=device)
    options = {"iterations": iterations, "seed": seed}
    steps, rate = INNER[world]
    meta = train(tasks, inner_steps=steps, inner_lr=rate, **options, progress=lambda s: progress("meta", s))
    averaged = train(tasks, inner_steps=0, **options, progress=lambda s: progress("averaged", s))
    torch.manual_seed(seed + 1)
    scratch = MAML(reward_network(tasks), loss=tasks.loss).to(tasks.device)
    results = []
    for demonstrations in DEMONSTRATIONS:
        for method, learner in (("meta", meta), ("averaged", averaged), ("scratch", scratch)):
            fitted = tuned(learner, tasks, demonstrations)
            found = judge(fitted, tasks, demonstrations, num_tasks=num_tasks)
            results.append(
                {
                    "world": world, "method": method, "demonstrations": demonstrations,
                    "value_difference": found.as_json(), "inner_steps": fitted.inner_steps, "inner_lr": fitted.inner_lr,
                }
            )  # fmt: skip
    return results
