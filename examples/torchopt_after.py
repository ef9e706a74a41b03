"""The loop of torchopt_before.py with all tasks at once: weights with a task dimension, and Adam on all of them.

    python examples/torchopt_after.py
"""

import argparse
import time

import torch
from torch import nn
from torch.nn.functional import mse_loss

from fastmeta.functional import adam_step, functional_mlp
from fastmeta.tasks import SinusoidTasks

TASKS, SHOTS, INNER_STEPS, INNER_LR = 32, 10, 3, 0.01


def predict(params, x):
    return functional_mlp(x, params[0::2], params[1::2], "tanh")


def main(steps, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    meta_optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    tasks = SinusoidTasks(shots=SHOTS)
    losses, seconds = [], -time.perf_counter()
    for _ in range(steps):
        batch = tasks.sample(TASKS)
        meta_optimizer.zero_grad()
        fast, state = [p.expand(TASKS, *p.shape) for p in net.parameters()], None
        for _ in range(INNER_STEPS):
            # the sum of the tasks' losses: each task's weights have the gradient of its own
            inner_loss = TASKS * mse_loss(predict(fast, batch.support_x), batch.support_y)
            grads = torch.autograd.grad(inner_loss, fast, create_graph=True)
            fast, state = adam_step(fast, list(grads), state, lr=INNER_LR)
        loss = mse_loss(predict(fast, batch.query_x), batch.query_y)
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
