"""The evaluation of easyfsl_before.py, many tasks at once, with the confidence interval that comes for free.

    python examples/easyfsl_after.py [--steps TASKS / 32]
"""

import argparse
import time

import torch
from torch import nn

import fastmeta
from fastmeta.tasks import EpisodeSampler

WAYS, SHOTS, QUERY_SHOTS, TASKS = 5, 5, 15, 32


def embeddings(classes=20, rows=40, width=64):
    """What a backbone gave for the images of a test set, one tensor for each class."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, 1, width, generator=generator)
    return list(centres + 1.5 * torch.randn(classes, rows, width, generator=generator))


def main(steps, seed=0):
    torch.manual_seed(seed)
    tasks = EpisodeSampler(embeddings(), ways=WAYS, shots=SHOTS, query_shots=QUERY_SHOTS)
    model = fastmeta.ProtoNet(nn.Identity(), metric="euclidean").eval()
    seconds = -time.perf_counter()
    with torch.no_grad():
        accuracy = torch.cat([model(tasks.sample(TASKS)).accuracy for _ in range(steps)])
    seconds += time.perf_counter()
    interval = 1.96 * accuracy.std() / len(accuracy) ** 0.5
    print(f"accuracy {accuracy.mean():.4f} +- {interval:.4f}, {1000 * seconds / steps:.1f} ms for {TASKS} tasks")
    return float(accuracy.mean()), seconds / steps


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    main(**vars(parser.parse_args()))
