"""WISDM (Kwapisz, Weiss, Moore 2010, "Activity Recognition using Cell Phone Accelerometers"): windows of ten seconds of
a phone's accelerometer, of 36 people who do up to six things."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta import values
from fastmeta.tasks._files import folder_of

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
    windows = _read(folder_of(FILE, "WISDM", "wisdm", data_root) / FILE)
    if split is None:
        return windows
    order = 1 + torch.randperm(_PEOPLE, generator=torch.Generator().manual_seed(0))
    parts = order.split([_TRAINING, _VALIDATION, _PEOPLE - _TRAINING - _VALIDATION])
    wanted = torch.isin(windows.person, parts[("train", "val", "test").index(split)])
    return Windows(*(column[wanted] for column in windows))


def _read(path: Path) -> Windows:
    # the header is damaged, the rows are whole
    _, _, data = path.read_text().partition("@data")
    rows = [line.split(",") for line in data.split()]
    if not rows or any(len(row) != _COLUMNS or row[-1] not in ACTIVITIES for row in rows):
        raise ValueError(f"{path} is damaged: rows must have {_COLUMNS} columns, an activity the last")
    x = torch.tensor([[float(number) for number in row[2 : 2 + _AXES * _BINS]] for row in rows])
    activity = torch.tensor([ACTIVITIES.index(row[-1]) for row in rows])
    return Windows(x.view(-1, _AXES, _BINS), activity, torch.tensor([int(row[1]) for row in rows]))
