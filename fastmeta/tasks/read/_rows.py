"""Rows of a store of examples, and their labels, from arrays of any kind."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmeta import values
from fastmeta.tasks.inputs import told_of_pixels
from fastmeta.tasks.read._warning import DataWarning

_CHANNELS = (1, 3, 4)
_AT_A_TIME = 1 << 24  # numbers that are looked through


def rows_of(rows: Tensor, name: str) -> Tensor:
    """Rows as `~fastmeta.tasks.read.arrays` makes them of `[R, ...]`: uint8 are images, and all are finite. Pictures
    that seem to go from 0 to 255 in another dtype are told in a `DataWarning`."""
    rows = _image(rows) if rows.dtype == torch.uint8 else rows
    _check_finite(rows, name)
    told = told_of_pixels(rows)
    if told:
        warnings.warn(f"{name}: {told}", DataWarning, stacklevel=3)
    return rows.unsqueeze(1) if rows.dim() == 1 else rows


def tensor_of(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, str) or not (hasattr(value, "__array__") or isinstance(value, (list, tuple))):
        raise TypeError(f"{name} must be a tensor, an array or a list of numbers, got {values.shown(value)}")
    try:
        array = np.asarray(value)
    except ValueError as error:  # lists of unequal length
        raise ValueError(f"{name} must be of one shape: {error}") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be numbers, got an array of {array.dtype}")
    if array.dtype.kind == "b":
        array = array.astype(np.float32)
    elif array.dtype.kind == "u" and array.dtype.itemsize > 1:
        if array.size and array.max() > np.iinfo(np.int64).max:
            raise ValueError(f"{name} must be below 2^63, got {array.max()}")
        array = array.astype({2: np.int32, 4: np.int64, 8: np.int64}[array.dtype.itemsize])
    elif array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(array if array.flags.writeable and min(array.strides, default=0) >= 0 else array.copy())


def labels_of(name: str, labels: np.ndarray) -> Tensor | list[str]:
    if labels.ndim != 1:
        raise ValueError(f"{name} must be one of each row, [R], got {list(labels.shape)}")
    if labels.dtype.kind == "S":
        return [one.decode("utf-8", "replace") for one in labels.tolist()]
    if labels.dtype.kind == "U":
        return labels.tolist()
    if labels.dtype.kind not in "biu":
        raise TypeError(f"{name} must be integers or texts, got {labels.dtype}")
    return torch.from_numpy(labels.astype(np.int64))


def _image(rows: Tensor) -> Tensor:
    shape = rows.shape[1:]
    if len(shape) == 2:
        return rows.unsqueeze(1)
    if len(shape) == 3 and shape[-1] in _CHANNELS and shape[0] not in _CHANNELS:
        return rows.permute(0, 3, 1, 2)
    return rows


def _check_finite(rows: Tensor, name: str) -> None:
    if not rows.is_floating_point() or not rows.numel():
        return
    for start, part in enumerate(rows.split(max(1, _AT_A_TIME // max(1, rows[0].numel())))):
        bad = ~part.isfinite().flatten(1).all(1) if part.dim() > 1 else ~part.isfinite()
        if bad.any():
            row = start * max(1, _AT_A_TIME // max(1, rows[0].numel())) + int(bad.nonzero()[0])
            raise ValueError(f"row {row} of {name} holds NaN or infinity; numbers must be finite")
