"""Attention that can be differentiated twice."""

from __future__ import annotations

import torch
from torch import nn
from torch.backends import cuda

# torch's fused attentions have no second derivative, on CPUs either: backward through an inner step would be refused
_FUSED = (
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
)


def called(module: nn.Module, args: tuple, kwargs: dict, *, second_order: bool):
    """`module(*args, **kwargs)`; where a second derivative may be wanted, with attention written out.

    The switches are those of `torch.nn.attention.sdpa_kernel`, which takes longer to turn them than a small model runs.
    """
    if not (second_order and torch.is_grad_enabled()):
        return module(*args, **kwargs)
    switched = [enable for enabled, enable in _FUSED if enabled()]
    for enable in switched:
        enable(False)
    try:
        return module(*args, **kwargs)
    finally:
        for enable in switched:
            enable(True)
