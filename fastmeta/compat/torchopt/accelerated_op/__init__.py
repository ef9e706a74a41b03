"""`torchopt.accelerated_op`: whether `use_accelerated_op=True` is served on a device."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from . import adam_op
from .adam_op import AdamOp

__all__ = ["AdamOp", "adam_op", "is_available"]


def is_available(devices: torch.device | str | int | Iterable | None = None) -> bool:
    """True but for CUDA devices where there are none. Default: the CPU and CUDA."""
    if devices is None:
        devices = ["cuda", "cpu"]
    elif isinstance(devices, (torch.device, str, int)):
        devices = [devices]
    return torch.cuda.is_available() or all(_type(d) != "cuda" for d in devices)


def _type(device: torch.device | str | int) -> str:
    return "cuda" if isinstance(device, int) else torch.device(device).type
