"""A learned loss as higher's users write it: only the import is changed.

A network judges the regressor's residuals; each task takes inner steps down that judgement, and the judge is trained so
that the regressor fits the task's query rows by mean squared error.

    python examples/higher_before.py
"""

import argparse
import time

import torch
from torch import nn
from torch.nn.functional import mse_loss

from fastmeta.compat import higher
from fastmeta.tasks import SinusoidTasks

TASKS, SHOTS, INNER_STEPS, INNER_LR = 32, 10, 3, 0.01


class LearnedLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.judge = nn.Sequential(nn.Linear(1, 16), nn.Softplus(), nn.Linear(16, 1), nn.Softplus())

    def forward(self, prediction, target):
        return self.judge((prediction - target) ** 2).mean()


def parts(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    loss = LearnedLoss()
    return net, loss, torch.optim.Adam([*net.parameters(), *loss.parameters()], lr=1e-3)


def main(steps, seed=0):
    net, learned_loss, meta_optimizer = parts(seed)
    inner_optimizer = torch.optim.SGD(net.parameters(), lr=INNER_LR)
    tasks = SinusoidTasks(shots=SHOTS)
    losses, seconds = [], -time.perf_counter()
    for _ in range(steps):
        batch = tasks.sample(TASKS)
        meta_optimizer.zero_grad()
        total = 0.0
        for x, y, query_x, query_y in zip(*batch, strict=True):
            with higher.innerloop_ctx(net, inner_optimizer, copy_initial_weights=False) as (fnet, diffopt):
                for _ in range(INNER_STEPS):
                    diffopt.step(learned_loss(fnet(x), y))
                loss = mse_loss(fnet(query_x), query_y) / TASKS
                loss.backward()
                total += loss.item()
        meta_optimizer.step()
        losses.append(total)
    seconds += time.perf_counter()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {1000 * seconds / steps:.1f} ms a step of {TASKS} tasks")
    return losses, seconds / steps


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    main(**vars(parser.parse_args()))
