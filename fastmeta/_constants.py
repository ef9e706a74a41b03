"""Small tensors of one number, kept from call to call: for few small tasks, making them takes as long as the kernel."""

from __future__ import annotations

from functools import lru_cache
from math import prod

import torch
from torch import Tensor

_MOST_NUMBERS = 4096


def filled(like: Tensor, shape: tuple[int, ...], value: float) -> Tensor:
    """A tensor full of `value`, not to be written into, with the dtype and device of `like`."""
    if like.is_cpu and prod(shape) <= _MOST_NUMBERS and _plain(like):  # a CUDA graph would own what it made
        return _kept(tuple(shape), value, like.dtype)
    return like.new_full(shape, value)


def _plain(like: Tensor) -> bool:
    return (
        type(like) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._is_tracing()
    )


@lru_cache(256)
def _kept(shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.full(shape, value, dtype=dtype, device="cpu")
