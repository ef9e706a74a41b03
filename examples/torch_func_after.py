"""The same MAML with the inner loops of all tasks in one call: the model is handed over unchanged.

Half the way is one line, `model = fastmeta.accelerate(model)` in torch_func_before.py, and the rest as it is. Both give
the gradient of plain autograd, one task at a time; torch.func alone takes batch norms' statistics for constants in the
second derivative (torch 2.13), and is 1.6 % away from it here.

    python examples/torch_func_after.py
"""

import argparse
import time

import torch

from fastmeta import MAML
from fastmeta.nn import conv4
from fastmeta.tasks import make_tasks

TASKS, STEPS, LR = 8, 2, 0.4


def main(steps, seed=0):
    torch.manual_seed(seed)
    model = conv4(1, 32, num_classes=5, track_running_stats=False)
    tasks, generator = make_tasks("glyphs", "val", query_shots=5), torch.Generator().manual_seed(seed)
    maml = MAML(model, inner_lr=LR, inner_steps=STEPS)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    losses, seconds = [], -time.perf_counter()
    for _ in range(steps):
        batch = tasks.sample(TASKS, generator=generator)
        mean = maml(batch).loss
        optimizer.zero_grad()
        mean.backward()
        optimizer.step()
        losses.append(mean.item())
    seconds += time.perf_counter()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {1000 * seconds / steps:.1f} ms a step of {TASKS} tasks")
    return losses, seconds / steps


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    main(**vars(parser.parse_args()))
