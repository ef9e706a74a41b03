"""WISDM (Kwapisz, Weiss, Moore 2010, "Activity Recognition using Cell Phone Accelerometers"): windows of ten seconds of
a phone's accelerometer, of 36 people who do up to six things; and tasks of one person each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta import values
from fastmeta.batch import TaskBatch
from fastmeta.tasks._arguments import check_sizes

ACTIVITIES = ("Walking", "Jogging", "Upstairs", "Downstairs", "Sitting", "Standing")
FILE = "WISDM_ar_v1.1_transformed.arff"
_PEOPLE, _COLUMNS, _AXES, _BINS = 36, 46, 3, 10
_TRAINING, _VALIDATION = 24, 6


class Windows(NamedTuple):
    """`R` labelled windows."""

    x: Tensor  # float32 [R, 3, 10]: of each axis, the share of the readings in ten ranges of equal width
    activity: Tensor  # int64 [R], positions in ACTIVITIES
    person: Tensor  # int64 [R], 1 to 36


def wisdm(split: str | None = None, data_root: str | os.PathLike | None = None) -> Windows:
    """The 5,418 windows of version 1.1, "transformed", which holds no raw signal: its 30 numbers that are one, the
    distributions of the readings along the three axes, as three channels of ten positions.

    Args:
        split: "train", "val" or "test": of 24, 6 and 6 people, in a fixed random order; None (default) for all.
        data_root: folder that holds `WISDM_ar_v1.1_transformed.arff`, itself or in `wisdm/`. Without it the folder that
            FASTMETA_DATA names.

    Raises:
        ValueError: an unknown split; a file that is missing or not complete, by name.
    """
    if split is not None:
        values.choice("split", split, ("train", "val", "test"))
    values.path("data_root", data_root, or_none=True)
    windows = _read(_find(data_root))
    if split is None:
        return windows
    order = 1 + torch.randperm(_PEOPLE, generator=torch.Generator().manual_seed(0))
    parts = order.split([_TRAINING, _VALIDATION, _PEOPLE - _TRAINING - _VALIDATION])
    wanted = torch.isin(windows.person, parts[("train", "val", "test").index(split)])
    return Windows(*(column[wanted] for column in windows))


def _find(data_root: str | os.PathLike | None) -> Path:
    root = data_root or os.environ.get("FASTMETA_DATA")
    if root is None:
        raise ValueError(f"WISDM is not downloaded: name the folder of {FILE} by data_root or FASTMETA_DATA")
    for folder in (Path(root), Path(root) / "wisdm"):
        if (folder / FILE).is_file():
            return folder / FILE
    raise ValueError(f"no WISDM in {root}: {FILE} must lie there or in {Path(root) / 'wisdm'}")


def _read(path: Path) -> Windows:
    # the header is damaged, the rows are whole
    _, _, data = path.read_text().partition("@data")
    rows = [line.split(",") for line in data.split()]
    if not rows or any(len(row) != _COLUMNS or row[-1] not in ACTIVITIES for row in rows):
        raise ValueError(f"{path} is damaged: rows must have {_COLUMNS} columns, an activity the last")
    x = torch.tensor([[float(number) for number in row[2 : 2 + _AXES * _BINS]] for row in rows])
    activity = torch.tensor([ACTIVITIES.index(row[-1]) for row in rows])
    return Windows(x.view(-1, _AXES, _BINS), activity, torch.tensor([int(row[1]) for row in rows]))


class PersonTasks:
    """Tasks of one person each: which of N activities is it, told by a few windows of that person's own.

    A task draws a person, N of the activities of which the person has `shots + query_shots` windows and more, and of
    each disjoint support and query windows. Labels are numbers from 0 to N - 1 in an order that is drawn too, so that
    nothing can be said without the support set.

    Args:
        x: float32 `[R, ...]`, the windows of all people, as `wisdm` gives them or your own.
        activity: int64 `[R]`, what is done in each.
        person: int64 `[R]`, by whom.
        ways: N, activities per task; 3 by default.
        shots: support windows per activity; 1 by default. S = N * shots, ordered by label.
        query_shots: query windows per activity; 5 by default. Q = N * query_shots, ordered by label.

    `sample` gives inputs `[T, S, ...]` and `[T, Q, ...]`, and labels int64.

    Raises:
        TypeError, ValueError: sizes below 1, columns of different lengths; nobody with as many activities and windows.
    """

    kind = "classification"

    def __init__(
        self, x: Tensor, activity: Tensor, person: Tensor, *, ways: int = 3, shots: int = 1, query_shots: int = 5
    ):
        check_sizes(ways=ways, shots=shots, query_shots=query_shots)
        if not len(x) == len(activity) == len(person):
            raise ValueError(f"x, activity and person must have as many rows: {len(x)}, {len(activity)}, {len(person)}")
        self.x, self.ways, self.shots, self.query_shots = x, ways, shots, query_shots
        people, who = person.unique(return_inverse=True)
        activities, what = activity.unique(return_inverse=True)
        group = who * len(activities) + what
        self._rows = group.argsort(stable=True)  # of a person's activity side by side
        counts = group.bincount(minlength=len(people) * len(activities)).view(len(people), len(activities))
        starts = counts.flatten().cumsum(0).view_as(counts) - counts
        enough = counts >= shots + query_shots
        serve = enough.sum(1) >= ways
        if not serve.any():
            raise ValueError(f"nobody has {ways} activities with {shots} + {query_shots} windows each")
        self._counts, self._starts, self._enough = counts[serve], starts[serve], enough[serve]

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    @property
    def output_size(self) -> int:
        return self.ways

    def sample(self, num_tasks: int, *, generator: torch.Generator | None = None) -> TaskBatch:
        """`num_tasks` tasks, drawn with `generator` (of the windows' device) or the global one."""
        values.count("num_tasks", num_tasks, 0)
        values.generator("generator", generator, self.x.device)
        drawn = {"device": self.x.device, "generator": generator}
        person = torch.randint(len(self._counts), (num_tasks,), **drawn)
        chosen = _some(self._enough[person], self.ways, drawn)  # [T, N]
        counts, starts = (column[person].gather(1, chosen) for column in (self._counts, self._starts))
        there = torch.arange(int(self._counts.max()), device=self.x.device) < counts.unsqueeze(-1)
        rows = self._rows[starts.unsqueeze(-1) + _some(there, self.shots + self.query_shots, drawn)]
        labels = torch.arange(self.ways, device=self.x.device)

        def part(rows: Tensor) -> tuple[Tensor, Tensor]:
            return self.x[rows.flatten(1)], labels.repeat_interleave(rows.shape[2]).repeat(num_tasks, 1)

        return TaskBatch(*part(rows[..., : self.shots]), *part(rows[..., self.shots :]))


def _some(allowed: Tensor, count: int, drawn: dict) -> Tensor:
    """`count` different positions of the last dimension, of those `allowed`, in random order."""
    return torch.rand(allowed.shape, **drawn).masked_fill(~allowed, -1.0).topk(count, -1).indices
