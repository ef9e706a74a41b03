"""Kernels without a second derivative, put aside while a loss is to be differentiated twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


@contextmanager
def twice_differentiable(cuda: bool) -> Iterator[None]:
    """While active, attention and recurrent layers run by kernels that plain autograd can differentiate twice: those of
    fused attention and, on CUDA tensors, of cuDNN's recurrent layers have no second derivative."""
    with sdpa_kernel(SDPBackend.MATH), _WithoutCudnn() if cuda else nullcontext():
        yield


class _WithoutCudnn(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in _RECURRENT:
            return func(*args, **(kwargs or {}))
        with torch.backends.cudnn.flags(enabled=False):
            return func(*args, **(kwargs or {}))
