"""Small tensors of one number, kept from call to call: for few small tasks, making them takes as long as the kernel."""

from __future__ import annotations

from functools import lru_cache
from math import prod

import torch
from torch import Tensor

_MOST_NUMBERS = {"cpu": 4096, "cuda": 65536}  # by device: launching takes longer than filling


def filled(like: Tensor, shape: tuple[int, ...], value: float) -> Tensor:
    """A tensor full of `value`, not to be written into, with the dtype and device of `like`."""
    # in this order: sizes of what is traced would be held to the answer
    if _plain(like) and prod(shape) <= _MOST_NUMBERS.get(like.device.type, 0):
        # a CUDA graph must own what it reads at every replay
        if like.is_cpu or not torch.cuda.is_current_stream_capturing():
            return _kept(tuple(shape), value, like.dtype, like.device)
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
def _kept(shape: tuple[int, ...], value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        made = torch.full(shape, value, dtype=dtype, device=device)
    if device.type == "cuda":  # other streams will read it
        torch.cuda.current_stream(device).synchronize()
    return made
