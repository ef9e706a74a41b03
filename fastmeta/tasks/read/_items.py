"""The items of data sets of other libraries: `torch.utils.data.Dataset` and Hugging Face `datasets.Dataset`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmeta import values
from fastmeta.tasks.read._pictures import square
from fastmeta.tasks.read._rows import rows_of

_IMAGES, _LABELS = ("image", "img", "x", "features"), ("label", "labels", "y", "fine_label")


def items_of(
    data: Any, image: str | None, label: str | None, image_size: int | None, grey: bool, name: str
) -> tuple[Tensor, Tensor | list[int | str], list[str] | None]:
    """Rows, labels and names of the classes (None: as the labels are). Arguments and errors as of
    `~fastmeta.tasks.read.dataset`."""
    if image_size is not None:
        values.count("image_size", image_size)
    values.flag("grey", grey)
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or isinstance(data, (dict, str)):
        splits = f"; it has the splits {', '.join(map(str, data))}: give one" if isinstance(data, dict) else ""
        raise TypeError(f"data must be a map-style data set, with a length and items by number, got {name}{splits}")
    if not len(data):
        raise ValueError(f"{name} is empty")
    columns = hasattr(data, "features") and hasattr(data, "column_names")
    if columns:
        image, label, classes = _columns(data, image, label)
    else:
        classes, one = getattr(data, "classes", None), data[0]
        if isinstance(one, Mapping):
            columns, kinds = True, {key: type(value).__name__ for key, value in one.items()}
            image = _column(kinds, "image", image, "Image", _IMAGES)
            label = _column(kinds, "label", label, "ClassLabel", _LABELS)
        elif image is not None or label is not None:
            raise ValueError(
                f"image and label are columns of a Hugging Face data set, or keys of items, and {name} has none"
            )
        if isinstance(data, torch.utils.data.TensorDataset) and len(data.tensors) == 2:
            rows, labels = data.tensors
            return rows_of(rows, name), labels, None

    def item(i: int) -> tuple[Tensor, Any]:
        one = data[i]
        if columns:
            x, y = one[image], one[label]
        elif isinstance(one, (tuple, list)) and len(one) == 2:
            x, y = one
        else:
            raise TypeError(f"item {i} of {name} must be a pair (x, y), got {values.shown(one)}")
        return _row(x, image_size, grey, f"item {i} of {name}"), _label(y, f"item {i} of {name}")

    first, _ = item(0)
    rows = first.new_empty((len(data), *first.shape))
    labels = []
    for i in range(len(data)):
        row, y = item(i)
        if row.shape != first.shape or row.dtype != first.dtype:
            raise ValueError(
                f"item {i} of {name} is {row.dtype} {list(row.shape)}, item 0 {first.dtype} {list(first.shape)}: all "
                "must be alike; a transform, or image_size for Pillow images, makes them so"
            )
        rows[i] = row
        labels.append(y)
    return rows_of(rows, name), labels, _names(labels, classes)


def _columns(data: Any, image: str | None, label: str | None) -> tuple[str, str, Sequence[str] | None]:
    kinds = {column: type(data.features[column]).__name__ for column in data.column_names}
    image = _column(kinds, "image", image, "Image", _IMAGES)
    label = _column(kinds, "label", label, "ClassLabel", _LABELS)
    return image, label, getattr(data.features[label], "names", None)


def _column(kinds: Mapping[str, str], what: str, given: str | None, kind: str, usual: Sequence[str]) -> str:
    """The name given, or the first of a kind, or the first of the usual names; `kinds` of those that there are."""
    if given is not None:
        if given not in kinds:
            raise ValueError(f"{what} must be one of the columns {', '.join(kinds)}; got {given!r}")
        return given
    fitting = [column for column in kinds if kinds[column] == kind] or [name for name in usual if name in kinds]
    if not fitting:
        raise ValueError(f"no column is of type {kind} or called {', '.join(usual)}: name one by {what}=")
    return fitting[0]


def _row(x: Any, image_size: int | None, grey: bool, where: str) -> Tensor:
    if isinstance(x, Tensor):
        return x
    if hasattr(x, "convert") and hasattr(x, "mode"):
        if image_size is not None:
            return torch.from_numpy(square(x, image_size, grey).copy())
        pixels = np.array(x.convert("L" if grey or x.mode in ("1", "L") else "RGB"))
        return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
    try:
        return torch.as_tensor(np.asarray(x))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{where}: x must be a tensor, an array or a Pillow image, got {type(x).__name__}") from error


def _label(y: Any, where: str) -> int | str:
    if isinstance(y, (Tensor, np.ndarray, np.generic)) and getattr(y, "ndim", 0) == 0:
        y = y.item()
    if isinstance(y, bool) or not isinstance(y, (int, str)):
        raise TypeError(f"{where}: y must be an integer or a text, got {values.shown(y)}")
    return y


def _names(labels: Sequence[int | str], classes: Sequence[str] | None) -> list[str] | None:
    there = sorted(set(labels), key=lambda one: (str(type(one)), one))
    if not isinstance(classes, (list, tuple)) or any(one not in range(len(classes)) for one in there):
        return None
    return [str(classes[one]) for one in there]
