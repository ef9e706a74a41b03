"""`python -m benchmarks.sampler`: episodes per second that the samplers give, which training must never wait for."""

from __future__ import annotations

import statistics

import torch
from rich.console import Console
from rich.table import Table

from fastmeta.tasks import EpisodeSampler, SinusoidTasks

from .measure import interleaved

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    # as large as Omniglot's training classes; what is in the images makes no difference
    images = torch.randint(256, (1028, 20, 1, 28, 28), dtype=torch.uint8, device=DEVICE)
    sources = {
        "5 way 1 shot 15 query": (EpisodeSampler(images, ways=5, shots=1, query_shots=15, rotations=True), 32),
        "20 way 1 shot 5 query": (EpisodeSampler(images, ways=20, shots=1, query_shots=5, rotations=True), 8),
        "60 way 1 shot 5 query": (EpisodeSampler(images, ways=60, shots=1, query_shots=5, rotations=True), 1),
        "sinusoid 10 shot": (SinusoidTasks(device=DEVICE), 1000),
    }
    table = Table("episodes", "tasks a batch", "ms a batch", "episodes/s")
    for name, (source, tasks) in sources.items():
        times = interleaved({"sample": lambda source=source, tasks=tasks: source.sample(tasks)}, seconds=2)
        median = statistics.median(times["sample"])
        table.add_row(name, str(tasks), f"{median * 1e3:.2f}", f"{tasks / median:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
