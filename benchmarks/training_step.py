"""`python -m benchmarks.training_step`: a step of training beside `MAML.gradients` of a batch that lies there.

Sinusoids, on the CPU with one thread: what is beside the gradients is drawing tasks, Adam, and looking whether the loss
and the gradient are finite.
"""

from __future__ import annotations

import statistics
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.measure import interleaved
from fastmeta.training import run_config
from fastmeta.training.run import build_trainer

AT_MOST = {25: 1.6, 100: 1.25, 10_000: 1.05}  # by tasks a step


def contenders(tasks: int) -> dict:
    config = run_config("maml", "sinusoid", task_batch=tasks, device="cpu", threads=1, eval_every=0, save_every=0)
    trainer = build_trainer(config, None)
    trainer.train_step()
    batch = trainer.tasks.sample(tasks, generator=trainer.generator)
    return {"gradients": lambda: trainer.algorithm.gradients(batch), "step": trainer.train_step}


def main(seconds: Annotated[float, typer.Option(help="of each comparison")] = 10.0) -> None:
    """Ratios of median times, taken in turn."""
    torch.set_num_threads(1)
    table = Table("tasks a step", "gradients, us", "step, us", "step / gradients")
    for tasks, most in AT_MOST.items():
        times = interleaved(contenders(tasks), seconds)
        gradients, step = (1e6 * statistics.median(times[name]) for name in ("gradients", "step"))
        met = "met" if step <= most * gradients else "MISSED"
        table.add_row(f"{tasks:,}", f"{gradients:.0f}", f"{step:.0f}", f"{step / gradients:.2f} ({met}: {most})")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
