"""Checks of what samplers are made with."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta import values


def check_images(images: Tensor, layout: str, least: int, most: int | None = None) -> None:
    """`images` are uint8 or floating, with `least` dimensions up to `most`, None for any more."""
    values.tensor("images", images)
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating, got {values.dtype_of(images)}")
    values.on_device("images", images)
    if images.dim() < least or (most is not None and images.dim() > most):
        raise ValueError(f"images must have shape {layout}, got {list(images.shape)}")


def exact_device(name: str, device: torch.device | str) -> torch.device:
    """With its number, as tensors name theirs."""
    return torch.empty(0, device=values.device(name, device)).device


def check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        values.count(name, size)
