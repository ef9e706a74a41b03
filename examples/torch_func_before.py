"""MAML by torch.func, as its tutorial has it: gradients of one task, mapped over tasks.

    python examples/torch_func_before.py
"""

import argparse
import time

import torch
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from fastmeta.nn import conv4
from fastmeta.tasks import make_tasks

TASKS, STEPS, LR = 8, 2, 0.4


def main(steps, seed=0):
    torch.manual_seed(seed)
    model = conv4(1, 32, num_classes=5, track_running_stats=False)
    tasks, generator = make_tasks("glyphs", "val", query_shots=5), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def loss(params, x, y):
        return F.cross_entropy(functional_call(model, params, (x,)), y)

    def after_adaptation(params, support_x, support_y, query_x, query_y):  # of one task
        for _ in range(STEPS):
            gradients = grad(loss)(params, support_x, support_y)
            params = {name: p - LR * gradients[name] for name, p in params.items()}
        return loss(params, query_x, query_y)

    losses, seconds = [], -time.perf_counter()
    for _ in range(steps):
        batch = tasks.sample(TASKS, generator=generator)
        mean = vmap(after_adaptation, in_dims=(None, 0, 0, 0, 0))(dict(model.named_parameters()), *batch).mean()
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
