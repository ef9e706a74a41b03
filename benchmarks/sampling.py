"""`python -m benchmarks.sampling`: how many episodes of photographs are drawn a second, beside what training takes.

84x84 RGB uint8, 5-way 1-shot with 15 queries, from memory and mapped from a file; a training step of Conv4-32 as
Prototypical Network and as MAML; and training in a process whose memory is limited to half of what the rows take.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from fastmeta import MAML, ProtoNet
from fastmeta.nn import conv4
from fastmeta.tasks import EpisodeSampler, Examples, TaskBatch, episodes_of

from .measure import interleaved

SIDE, WAYS, INSTANCES = 84, 5, 600  # as mini-ImageNet has them
SIZES = {"ways": WAYS, "shots": 1, "query_shots": 15}
NEEDED, WITHIN = 5, 0.2  # times what training takes; of what comes from memory
STEPS = 60  # with little memory
CONTRAST = 12  # of a class's picture, beside noise of 128: a few steps learn it


def photographs(classes: int) -> Examples:
    """Each class a coarse picture of its own, and much noise."""
    drawn = torch.Generator().manual_seed(0)
    rows = torch.randint(128, (classes, INSTANCES, 3, SIDE, SIDE), dtype=torch.uint8, generator=drawn)
    pictures = torch.randint(CONTRAST, (classes, 1, 3, 6, 6), dtype=torch.uint8, generator=drawn)
    rows += pictures.repeat_interleave(SIDE // 6, -1).repeat_interleave(SIDE // 6, -2)
    return Examples(rows.flatten(0, 1), torch.arange(classes).repeat_interleave(INSTANCES), name="photographs")


def learners() -> dict[str, nn.Module]:
    return {
        "ProtoNet": ProtoNet(conv4(3, 32), ways=WAYS),
        "MAML, 1 step": MAML(
            conv4(3, 32, num_classes=WAYS, image_size=SIDE, track_running_stats=False), inner_lr=0.01, inner_steps=1
        ),
    }


def step(learner: nn.Module, batch: TaskBatch) -> float:
    learner.zero_grad()
    output = learner(batch)
    output.loss.backward()
    return float(output.accuracy.mean())


def rates(contenders: dict, tasks: int, seconds: float) -> dict[str, float]:
    """Tasks per second."""
    return {name: tasks / statistics.median(times) for name, times in interleaved(contenders, seconds).items()}


def with_little_memory(path: Path) -> None:
    """Trains from mapped rows, after checking that they would not fit."""
    examples = Examples.load(path)
    tasks = episodes_of(examples, device="cpu", **(SIZES | {"query_shots": 5}))
    learner, generator = ProtoNet(conv4(3, 32), ways=WAYS), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(learner.parameters(), 1e-3)
    # the map itself counts as private data, though nothing is set aside for it
    taken = next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").open() if line.startswith("VmData"))
    limit = taken + examples.rows.nbytes // 2
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        examples.rows.clone()
    except RuntimeError:
        pass
    else:
        raise AssertionError("the rows would fit: nothing is shown")
    began, accuracy = time.perf_counter(), []
    for _ in range(STEPS):
        accuracy.append(step(learner, tasks.sample(1, generator=generator)))
        optimizer.step()
    first, last = (statistics.mean(part) for part in (accuracy[: STEPS // 4], accuracy[-STEPS // 4 :]))
    print(f"{STEPS} steps in {time.perf_counter() - began:.1f} s, accuracy {first:.3f} in the first quarter of them, "
          f"{last:.3f} in the last")  # fmt: skip


def main(
    classes: Annotated[int, typer.Option(help=f"of {INSTANCES} images; 64 take 0.8 GB")] = 64,
    seconds: Annotated[float, typer.Option(help="of each comparison")] = 10.0,
    limited: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Episodes from memory and from a file, beside training."""
    if limited is not None:
        with_little_memory(limited)
        return
    console, table = Console(), Table("tasks a batch", "tasks/s from memory", "mapped", "mapped / memory")
    examples = photographs(classes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photographs.safetensors"
        began = time.perf_counter()
        examples.save(path)
        size = examples.rows.nbytes / 1e9
        console.print(f"{examples}: {size:.2f} GB, written in {time.perf_counter() - began:.1f} s")
        memory, mapped = (EpisodeSampler(rows, **SIZES) for rows in (examples, Examples.load(path)))
        drawn = {}
        for tasks in (4, 64):
            contenders = {
                "memory": lambda tasks=tasks: memory.sample(tasks),
                "mapped": lambda tasks=tasks: mapped.sample(tasks),
            }
            drawn[tasks] = rates(contenders, tasks, seconds)
            one, other = drawn[tasks]["memory"], drawn[tasks]["mapped"]
            met = "met" if other >= (1 - WITHIN) * one else "MISSED"
            table.add_row(str(tasks), f"{one:.0f}", f"{other:.0f}", f"{other / one:.2f} ({met}: {1 - WITHIN})")
        console.print(table)
        batch, ahead = memory.sample(4), episodes_of(Examples.load(path), device="cpu", **SIZES)
        generator, trained = torch.Generator().manual_seed(0), {}
        for name, learner in learners().items():
            trained[name] = lambda learner=learner: step(learner, batch)
            trained[name, "ahead"] = lambda learner=learner: step(learner, ahead.sample(4, generator=generator))
        found = rates(trained, 4, seconds)
        table = Table("Conv4-32, 4 tasks a batch", "tasks/s trained", "drawn / trained", "tasks/s with drawing ahead")
        for name in learners():
            ratio = drawn[4]["mapped"] / found[name]
            met = "met" if ratio >= NEEDED else "MISSED"
            table.add_row(name, f"{found[name]:.2f}", f"{ratio:.0f} ({met}: {NEEDED})", f"{found[name, 'ahead']:.2f}")
        console.print(table)
        command = [sys.executable, "-m", f"{__package__}.sampling", "--limited", str(path)]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        console.print(f"With {size / 2:.2f} GB of memory: {found}")


if __name__ == "__main__":
    typer.run(main)
