"""Checks of what the worlds' methods are called with."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import values


def check_worlds(worlds, kind: type) -> None:
    if not isinstance(worlds, kind):
        raise TypeError(f"worlds must be what `worlds` returns, {kind.__name__}, got {type(worlds).__name__}")


def check_demonstration(
    worlds, kind: type, demonstrations: int, generator: torch.Generator | None, device: torch.device
) -> None:
    check_worlds(worlds, kind)
    values.count("demonstrations", demonstrations)
    values.generator("generator", generator, device)


def check_rewards(rewards: Tensor, shape: tuple[int, ...]) -> None:
    """`rewards` are floating, one for each state: `[T, S, 1]` with `shape` = (T, S)."""
    values.tensor("rewards", rewards)
    if not rewards.is_floating_point():
        raise TypeError(f"rewards must be floating, got {values.dtype_of(rewards)}")
    values.on_device("rewards", rewards)
    if rewards.shape != (*shape, 1):
        raise ValueError(f"rewards must have shape [T, S, 1] = {[*shape, 1]}, got {list(rewards.shape)}")
