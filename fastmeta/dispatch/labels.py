"""The range of class labels: what only the data tells, checked where an op meets real tensors."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from fastmeta import values

_check_labels = os.environ.get("FASTMETA_CHECK_LABELS", "1") != "0"


def check_labels(enabled: bool) -> None:
    """Switch the range check of labels on CUDA tensors, which waits for the GPU (default: on).

    Labels on the CPU are always checked. `FASTMETA_CHECK_LABELS=0` sets the default to off.
    """
    global _check_labels
    _check_labels = values.flag("enabled", enabled)


def label_range(name: str, value: Tensor, num_classes: int) -> None:
    """Labels lie in [0, num_classes). Reads the data: called below the dispatcher, where there are real tensors."""
    if value.numel() == 0:
        return
    if value.is_cuda and (not _check_labels or torch.cuda.is_current_stream_capturing()):
        return
    low, high = (int(bound) for bound in torch.aminmax(value))
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise ValueError(f"{name} must lie in [0, num_classes) = [0, {num_classes}), got {wrong}")
