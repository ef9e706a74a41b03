"""Where rows live while a model trains."""

from __future__ import annotations

from typing import Any

import torch

from fastmeta.tasks._arguments import exact_device
from fastmeta.tasks.episodes import EpisodeSampler
from fastmeta.tasks.examples import Examples
from fastmeta.tasks.prefetch import Prefetched
from fastmeta.tasks.source import TaskSource

_SHARE = 0.5  # of the device's free memory: the other half is for the model and its graph


def placed(examples: Examples, device: torch.device | str) -> Examples:
    """The examples with their rows on a GPU, if they take at most half of what is free there; else as they are."""
    device = exact_device("device", device)
    if device.type == "cpu" or examples.rows.device == device:
        return examples
    free, _ = torch.cuda.mem_get_info(device)
    needed = examples.rows[:1].nbytes * len(examples.order)
    return examples.to(device) if needed <= _SHARE * free else examples


def episodes_of(examples: Examples, *, device: torch.device | str, **options: Any) -> TaskSource:
    """An `EpisodeSampler` with these options whose batches lie on `device`, and its rows where they serve it best.

    On the device if they fit (see `placed`); else where they are, in memory or mapped from a file, and then the next
    batch is drawn while training computes (`Prefetched`).
    """
    examples = placed(examples, device)
    tasks = EpisodeSampler(examples, device=device, **options)
    away = examples.mapped or examples.rows.device != tasks.device
    return Prefetched(tasks) if away else tasks
