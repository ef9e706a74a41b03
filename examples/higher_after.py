"""The learned loss of higher_before.py, with all tasks at once.

    python examples/higher_after.py
"""

import argparse
import time

import torch
from torch import nn
from torch.nn.functional import mse_loss

import fastmeta
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
    maml = fastmeta.MAML(net, inner_lr=INNER_LR, inner_steps=INNER_STEPS, loss=learned_loss)
    tasks = SinusoidTasks(shots=SHOTS)
    losses, seconds = [], -time.perf_counter()
    for _ in range(steps):
        batch = tasks.sample(TASKS)
        meta_optimizer.zero_grad()
        fast = maml.adapt(batch.support_x, batch.support_y)
        loss = mse_loss(maml.predict(fast, batch.query_x), batch.query_y)
        loss.backward()
        meta_optimizer.step()
        losses.append(loss.item())
    seconds += time.perf_counter()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {1000 * seconds / steps:.1f} ms a step of {TASKS} tasks")
    return losses, seconds / steps


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    main(**vars(parser.parse_args()))
