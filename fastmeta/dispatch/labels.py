"""The range of class labels: what only the data tells, checked where an op meets real tensors."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from fastmeta import values

IGNORED = -100  # what torch's losses ignore by default
IGNORING = "loss=torch.nn.CrossEntropyLoss() ignores rows so labelled"
_TRACING = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)
_check_labels = os.environ.get("FASTMETA_CHECK_LABELS", "1") != "0"


def check_labels(enabled: bool) -> None:
    """Switch the checks of labels on CUDA tensors, which wait for the GPU (default: on).

    Labels on the CPU are always checked. `FASTMETA_CHECK_LABELS=0` sets the default to off. Learners on embeddings then
    take it that every task has the classes 0 to N - 1, each with support rows, unless the batch has masks.
    """
    global _check_labels
    _check_labels = values.flag("enabled", enabled)


def readable(value: Tensor) -> bool:
    """Whether what labels hold may be looked at: not on a GPU whose checks are off or whose stream is being captured,
    nor where there are no numbers: in what is compiled or traced, of fake tensors, or mapped over by `vmap`."""
    if value.is_cuda and (not _check_labels or torch.cuda.is_current_stream_capturing()):
        return False
    if torch.compiler.is_compiling() or value.is_meta or type(value) is torch._subclasses.FakeTensor:
        return False
    if torch._C._len_torch_dispatch_stack() and any(map(torch._C._get_dispatch_mode, _TRACING)):
        return False
    return all_levels(value) is value


def all_levels(value: Tensor) -> Tensor:
    """`value` `[T, B]` itself, or where `torch.func.vmap` maps over it the labels of all that it maps over,
    `[M T, B]`."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return value
    functorch, inner, mapped = torch._C._functorch, value, False
    while functorch.is_gradtrackingtensor(inner) or functorch.is_batchedtensor(inner):
        dim = functorch.maybe_get_bdim(inner)
        inner = functorch.get_unwrapped(inner)
        if dim >= 0:
            inner, mapped = inner.movedim(dim, 0).flatten(0, 1), True
    return inner if mapped else value


def label_range(name: str, value: Tensor, num_classes: int, *, ignored: int | None = None, advice: str = "") -> None:
    """Labels lie in [0, num_classes), or are `ignored`. Reads the data: called below the dispatcher, where there are
    real tensors. advice: for who comes with torch's label for rows to be ignored."""
    if value.numel() == 0:
        return
    if value.is_cuda and (not _check_labels or torch.cuda.is_current_stream_capturing()):
        return
    if ignored is not None:
        value = value.masked_fill(value == ignored, 0)
    low, high = (int(bound) for bound in torch.aminmax(value))
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        more = f"; {advice}" if wrong == IGNORED and advice else ""
        raise ValueError(f"{name} must lie in [0, num_classes) = [0, {num_classes}), got {wrong}{more}")
