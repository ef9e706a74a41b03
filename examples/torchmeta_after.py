"""The prototypical network of torchmeta_before.py, with tasks that are one gather and a loss that is one op.

    python examples/torchmeta_after.py [--folder WITH_OMNIGLOT]
"""

import argparse
import time

import torch
from torch import nn

import fastmeta
from fastmeta.tasks import make_tasks

WAYS, SHOTS, QUERY_SHOTS, TASKS = 5, 5, 15, 32


def main(steps, folder, seed=0):
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 64))
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
    name = "omniglot" if folder else "glyphs"
    tasks = make_tasks(name, "val", ways=WAYS, shots=SHOTS, query_shots=QUERY_SHOTS, data_root=folder)
    learner = fastmeta.ProtoNet(encoder)
    losses, seconds = [], -time.perf_counter()
    for _ in range(steps):
        loss = learner(tasks.sample(TASKS)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    seconds += time.perf_counter()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {1000 * seconds / steps:.1f} ms a step of {TASKS} tasks")
    return losses, seconds / steps


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder")
    main(**vars(parser.parse_args()))
