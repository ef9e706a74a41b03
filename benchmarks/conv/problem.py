"""What is timed: a net, a batch of tasks, and how they adapt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import fastmeta.nn
from fastmeta import TaskBatch
from fastmeta.dispatch.spec import Make

DATA = Path(__file__).parents[3] / "shared" / "data" / "wisdm" / "WISDM_ar_v1.1_transformed.arff"
ACTIVITIES = ("Walking", "Jogging", "Upstairs", "Downstairs")  # those that most users have


@dataclass(frozen=True)
class Problem:
    """The meta-gradient of `model` on `batch` after `steps` inner steps; the loss is the cross entropy."""

    model: nn.Module
    batch: TaskBatch
    lr: float = 0.01
    steps: int = 1
    first_order: bool = False


def _images(make: Make, tasks: int, ways: int, shots: int, queries: int, *shape: int) -> TaskBatch:
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
    encoder = fastmeta.nn.conv4(channels, hidden, track_running_stats=False)
    model = nn.Sequential(*encoder, nn.Linear(hidden * (side // 16) ** 2, ways)).to(make.device, make.dtype)
    return Problem(model, _images(make, tasks, ways, shots, queries, channels, side, side), steps=steps)


def resnet12(make: Make, small: bool, *, first_order: bool) -> Problem:
    side, widths, queries = (16, (4, 4, 8, 8), 2) if small else (84, (64, 128, 256, 512), 15)
    torch.manual_seed(0)
    encoder = fastmeta.nn.resnet12(3, widths, track_running_stats=False)
    model = nn.Sequential(encoder, nn.Linear(widths[-1], 5)).to(make.device, make.dtype)
    return Problem(model, _images(make, 2, 5, 1, queries, 3, side, side), first_order=first_order)


def prototypes(make: Make, small: bool) -> Problem:
    """An episode of 20 ways, 1 shot and 5 queries for an encoder alone."""
    hidden, side, ways = (6, 16, 4) if small else (64, 28, 20)
    torch.manual_seed(0)
    encoder = fastmeta.nn.conv4(1, hidden).to(make.device, make.dtype)
    return Problem(encoder, _images(make, 1, ways, 1, 5, 1, side, side), steps=0)


def sensors(make: Make, small: bool) -> Problem:
    """People as tasks, four activities, five windows of each to adapt on and five to judge on, K = 5."""
    tasks, width, steps = (2, 6, 2) if small else (16, 64, 5)
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    for channels in (3, width, width):
        norm = nn.BatchNorm1d(width, track_running_stats=False)
        blocks += [nn.Conv1d(channels, width, 3, padding=1), norm, nn.MaxPool1d(2), nn.ReLU()]
    model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(width, len(ACTIVITIES))).to(make.device, make.dtype)
    windows = people(tasks, 10)
    if windows is None:
        windows = torch.randn(tasks, len(ACTIVITIES), 10, 3, 10)
    support, query = windows.to(make.device, make.dtype).split(5, 2)
    labels = torch.arange(len(ACTIVITIES), device=make.device).repeat_interleave(5).expand(tasks, -1)
    return Problem(model, TaskBatch(support.flatten(1, 2), labels, query.flatten(1, 2), labels), steps=steps)


def people(tasks: int, rows: int) -> Tensor | None:
    """`[tasks, activities, rows, 3, 10]` of WISDM: what part of a window's accelerations fell into each of ten bins,
    along three axes, less the mean and over the deviation. None where the data are not there."""
    if not DATA.is_file():
        return None
    found: dict[str, dict[str, list[list[float]]]] = {}
    for line in DATA.read_text().split("@data")[1].split():
        _, user, *numbers, activity = line.replace('"', "").split(",")
        bins = [float(number) for number in numbers[:30]]
        found.setdefault(user, {}).setdefault(activity, []).append(bins)
    whole = [user for user in found.values() if all(len(user.get(a, ())) >= rows for a in ACTIVITIES)][:tasks]
    windows = torch.tensor([[user[a][:rows] for a in ACTIVITIES] for user in whole])
    return ((windows - windows.mean()) / windows.std()).unflatten(-1, (3, 10))
