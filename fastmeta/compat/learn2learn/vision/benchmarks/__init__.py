"""Tasksets by name: Omniglot, and two kinds of tasks that need no data.

Where it differs from 0.2.0: the splits share no classes (there all three draw from all characters), and are the same in
every run; images are averaged down to 28 x 28; "glyphs" and "sinusoid" are fastmeta's own.
"""

from __future__ import annotations

import os
from collections import namedtuple

from ...data.task_dataset import Taskset
from .images import glyphs_tasksets, omniglot_tasksets
from .sinusoid import SinusoidTaskset

__all__ = ["BenchmarkTasksets", "get_tasksets", "list_tasksets"]

BenchmarkTasksets = namedtuple("BenchmarkTasksets", ("train", "validation", "test"))

_TASKSETS = {"omniglot": omniglot_tasksets, "glyphs": glyphs_tasksets}
_ELSEWHERE = ("mini-imagenet", "tiered-imagenet", "fc100", "cifarfs")


def list_tasksets():
    """The names that `get_tasksets` takes."""
    return {**_TASKSETS, "sinusoid": SinusoidTaskset}.keys()


def get_tasksets(
    name: str,
    train_ways: int = 5,
    train_samples: int = 10,
    test_ways: int = 5,
    test_samples: int = 10,
    num_tasks: int = -1,
    root="~/data",
    device=None,
    **kwargs,
) -> BenchmarkTasksets:
    """Tasksets `(train, validation, test)`.

    Args:
        name: one of `list_tasksets()`.
        train_ways: classes of a task for training, 5 by default; of no meaning for sinusoids.
        train_samples: samples of each class, support and query together, 10 by default; of a sinusoid, its points.
        test_ways, test_samples: those of validation and test.
        num_tasks: of each taskset; -1 (default) for tasks without end.
        root: where Omniglot lies; else as `vision.datasets.FullOmniglot` says. It is downloaded if it is nowhere.
        device: where the data lies; by default the CPU.

    Raises:
        KeyError: a name that is not listed.
    """
    if name == "sinusoid":
        sizes = train_samples, test_samples, test_samples
        return BenchmarkTasksets(*(SinusoidTaskset(size, num_tasks, device) for size in sizes))
    if name not in _TASKSETS:
        why = "has no data in fastmeta" if name in _ELSEWHERE else f"is none of {', '.join(list_tasksets())}"
        raise KeyError(f"{name!r} {why}: make tasks of your own data with data.MetaDataset and data.Taskset")
    datasets, transforms = _TASKSETS[name](
        train_ways=train_ways,
        train_samples=train_samples,
        test_ways=test_ways,
        test_samples=test_samples,
        root=os.path.expanduser(root),
        device=device,
        **kwargs,
    )
    pairs = zip(datasets, transforms, strict=True)
    return BenchmarkTasksets(*(Taskset(dataset, t, num_tasks=num_tasks) for dataset, t in pairs))
