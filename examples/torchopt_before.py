"""MAML with Adam in the inner loop, as TorchOpt's users write it: only the import is changed.

    python examples/torchopt_before.py
"""

import argparse
import time

import torch
from torch import nn
from torch.nn.functional import mse_loss

from fastmeta.compat import torchopt
from fastmeta.tasks import SinusoidTasks

TASKS, SHOTS, INNER_STEPS, INNER_LR = 32, 10, 3, 0.01


def main(steps, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    inner_optimizer = torchopt.MetaAdam(net, lr=INNER_LR)
    meta_optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    tasks = SinusoidTasks(shots=SHOTS)
    losses, seconds = [], -time.perf_counter()
    for _ in range(steps):
        batch = tasks.sample(TASKS)
        meta_optimizer.zero_grad()
        net_state = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
        optimizer_state = torchopt.extract_state_dict(inner_optimizer, by="reference")
        total = 0.0
        for x, y, query_x, query_y in zip(*batch, strict=True):
            for _ in range(INNER_STEPS):
                inner_optimizer.step(mse_loss(net(x), y))
            loss = mse_loss(net(query_x), query_y) / TASKS
            loss.backward()
            total += loss.item()
            torchopt.recover_state_dict(net, net_state)
            torchopt.recover_state_dict(inner_optimizer, optimizer_state)
        meta_optimizer.step()
        losses.append(total)
    seconds += time.perf_counter()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {1000 * seconds / steps:.1f} ms a step of {TASKS} tasks")
    return losses, seconds / steps


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    main(**vars(parser.parse_args()))
