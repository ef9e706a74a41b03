"""What is timed: a net, a batch of tasks, and how they adapt."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import fastmeta.nn
from fastmeta import TaskBatch
from fastmeta.dispatch.spec import Make
from fastmeta.tasks.person_tasks import PersonTasks
from fastmeta.tasks.wisdm import wisdm

DATA = os.environ.get("FASTMETA_DATA", Path(__file__).parents[3] / "shared" / "data")


@dataclass(frozen=True)
class Problem:
    """The meta-gradient of `model` on `batch` after `steps` inner steps; the loss is the cross entropy."""

    model: nn.Module
    batch: TaskBatch
    lr: float = 0.01
    steps: int = 1
    first_order: bool = False


def _tasks(make: Make, tasks: int, ways: int, shots: int, queries: int, *shape: int) -> TaskBatch:
    return TaskBatch(
        make.normal(tasks, ways * shots, *shape),
        make.balanced_labels(tasks, ways, shots),
        make.normal(tasks, ways * queries, *shape),
        make.balanced_labels(tasks, ways, queries),
    )


def conv4(
    make: Make,
    small: bool,
    *,
    shots: int,
    steps: int,
    tasks: int,
    hidden: int = 64,
    channels: int = 1,
    side: int = 28,
    ways: int = 5,
    queries: int = 15,
) -> Problem:
    """Conv4 and a linear head, adapted as a whole. Small: few channels on small images, the same layers."""
    if small:
        hidden, side, tasks, steps, queries = 6, 16 + side % 3, 2, min(steps, 2), 2
    torch.manual_seed(0)
    options = {"num_classes": ways, "image_size": side, "track_running_stats": False}
    model = fastmeta.nn.conv4(channels, hidden, **options).to(make.device, make.dtype)
    return Problem(model, _tasks(make, tasks, ways, shots, queries, channels, side, side), steps=steps)


def resnet12(make: Make, small: bool, *, first_order: bool) -> Problem:
    side, widths, queries = (16, (4, 4, 8, 8), 2) if small else (84, (64, 128, 256, 512), 15)
    torch.manual_seed(0)
    encoder = fastmeta.nn.resnet12(3, widths, track_running_stats=False)
    model = nn.Sequential(encoder, nn.Linear(widths[-1], 5)).to(make.device, make.dtype)
    return Problem(model, _tasks(make, 2, 5, 1, queries, 3, side, side), first_order=first_order)


def prototypes(make: Make, small: bool) -> Problem:
    """An episode of 20 ways, 1 shot and 5 queries for an encoder alone."""
    hidden, side, ways = (6, 16, 4) if small else (64, 28, 20)
    torch.manual_seed(0)
    encoder = fastmeta.nn.conv4(1, hidden).to(make.device, make.dtype)
    return Problem(encoder, _tasks(make, 1, ways, 1, 5, 1, side, side), steps=0)


def sensors(make: Make, small: bool) -> Problem:
    """People as tasks: four activities, five windows of each to adapt on and five to judge on, K = 5. Windows of WISDM,
    or random numbers of their shape where they are not at hand."""
    tasks, hidden, steps, ways, rows = (2, 6, 2, 4, 5) if small else (16, 64, 5, 4, 5)
    torch.manual_seed(0)
    model = fastmeta.nn.conv4_1d(3, hidden, num_classes=ways, track_running_stats=False).to(make.device, make.dtype)
    try:
        windows = wisdm(data_root=DATA)
    except ValueError:
        batch = _tasks(make, tasks, ways, rows, rows, 3, 10)
    else:
        people = PersonTasks(*windows, ways=ways, shots=rows, query_shots=rows)
        # not 0: there a plain float64 loop's gradient jumps by 13 % where weights move by 1e-7, at a tie of a pool
        batch = people.sample(tasks, generator=torch.Generator().manual_seed(1)).to(make.device).to(make.dtype)
    return Problem(model, batch, steps=steps)


def in_one_row(model: nn.Module) -> nn.Sequential:
    """The layers of a net of nested `nn.Sequential`, which keep their parameters."""
    layers = [in_one_row(layer) if isinstance(layer, nn.Sequential) else [layer] for layer in model]
    return nn.Sequential(*(layer for part in layers for layer in part))
