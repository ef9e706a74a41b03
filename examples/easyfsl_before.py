"""An evaluation on embeddings as easyfsl's users write it: only the imports are changed.

    python examples/easyfsl_before.py [--steps TASKS / 32]
"""

import argparse
import random
import time

import torch
from torch.utils.data import DataLoader

from fastmeta.compat.easyfsl.datasets import FeaturesDataset
from fastmeta.compat.easyfsl.methods import PrototypicalNetworks
from fastmeta.compat.easyfsl.samplers import TaskSampler
from fastmeta.compat.easyfsl.utils import evaluate

WAYS, SHOTS, QUERY_SHOTS, TASKS = 5, 5, 15, 32


def embeddings(classes=20, rows=40, width=64):
    """What a backbone gave for the images of a test set, by the class's name."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, 1, width, generator=generator)
    features = centres + 1.5 * torch.randn(classes, rows, width, generator=generator)
    return {f"class {number}": rows for number, rows in enumerate(features)}


def main(steps, seed=0):
    random.seed(seed)
    dataset = FeaturesDataset.from_dict(embeddings())
    sampler = TaskSampler(dataset, n_way=WAYS, n_shot=SHOTS, n_query=QUERY_SHOTS, n_tasks=steps * TASKS)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=sampler.episodic_collate_fn)
    seconds = -time.perf_counter()
    accuracy = evaluate(PrototypicalNetworks(), loader, device="cpu", use_tqdm=False)
    seconds += time.perf_counter()
    print(f"accuracy {accuracy:.4f}, {1000 * seconds / steps:.1f} ms for {TASKS} tasks")
    return accuracy, seconds / steps


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    main(**vars(parser.parse_args()))
