"""WISDM (Kwapisz, Weiss, Moore 2010, "Activity Recognition using Cell Phone Accelerometers"): windows of ten seconds of
a phone's accelerometer, of 36 people who do up to six things."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta import values

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
