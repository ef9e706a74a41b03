"""MAML on sine waves as learn2learn's users write it: only the import is changed.

    python examples/learn2learn_before.py [--steps 1000]
"""

import argparse
import math
import time

import torch
from torch import nn, optim

from fastmeta.compat import learn2learn as l2l

SHOTS, TASKS, ADAPT_STEPS, ADAPT_LR, META_LR = 10, 32, 5, 0.01, 0.001


class SineModel(nn.Module):
    def __init__(self, dim=40):
        super().__init__()
        self.hidden1 = nn.Linear(1, dim)
        self.hidden2 = nn.Linear(dim, dim)
        self.hidden3 = nn.Linear(dim, 1)

    def forward(self, x):
        x = nn.functional.relu(self.hidden1(x))
        x = nn.functional.relu(self.hidden2(x))
        return self.hidden3(x)


def sine_task():
    amplitude, phase = 0.1 + 4.9 * torch.rand(()), math.pi * torch.rand(())
    x = 10 * torch.rand(2 * SHOTS, 1) - 5
    return x, amplitude * torch.sin(x - phase)


def main(steps, seed=0):
    torch.manual_seed(seed)
    maml = l2l.algorithms.MAML(SineModel(), lr=ADAPT_LR, first_order=False)
    opt = optim.Adam(maml.parameters(), META_LR)
    lossfn = nn.MSELoss()
    losses, seconds = [], -time.perf_counter()
    for _ in range(steps):
        meta_loss = 0.0
        for _ in range(TASKS):
            x, y = sine_task()
            learner = maml.clone()
            for _ in range(ADAPT_STEPS):
                learner.adapt(lossfn(learner(x[:SHOTS]), y[:SHOTS]))
            meta_loss += lossfn(learner(x[SHOTS:]), y[SHOTS:])
        meta_loss = meta_loss / TASKS
        opt.zero_grad()
        meta_loss.backward()
        opt.step()
        losses.append(meta_loss.item())
    seconds += time.perf_counter()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {1000 * seconds / steps:.1f} ms a step of {TASKS} tasks")
    return losses, seconds / steps


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
