"""`torchopt.accelerated_op`: whether `use_accelerated_op=True` is served on a device."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fastmeta.compat._absent import not_here


def is_available(devices: torch.device | str | int | Iterable | None = None) -> bool:
    """True on the CPU, and on CUDA devices where there are some. Default: both."""
    if devices is None:
        devices = ["cuda", "cpu"]
    elif isinstance(devices, (torch.device, str, int)):
        devices = [devices]
    return all(torch.device(d).type == "cpu" or torch.cuda.is_available() for d in devices)


__getattr__ = not_here(__name__, "TorchOpt 0.7.3", ("AdamOp", "adam_op"), "Use fastmeta.functional.adam_step.")
