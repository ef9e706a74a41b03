"""What a call of torch's own layers asks for, in the words of `norm_act_pool`; None where that cannot serve it.

Each function has the signature of torch's, reads options alone, and looks at no tensor's shape: the caller knows
whether a task dimension stands in front.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
) -> dict[str, Any] | None:
    if running_mean is None or training:
        # in train mode running statistics are updated as well, which is not the norm's work alone
        served = training and running_mean is None
        return {"norm": "batch", "weight": weight, "bias": bias, "eps": eps} if served else None
    running = (running_mean, running_var)
    return {"norm": "batch", "weight": weight, "bias": bias, "eps": eps, "running": running}


def _instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
) -> dict[str, Any] | None:
    asked = _batch_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return asked and asked | {"norm": "instance"}


def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5) -> dict[str, Any]:
    return {"norm": "group", "groups": num_groups, "weight": weight, "bias": bias, "eps": eps}


def _relu(input, inplace=False) -> dict[str, Any] | None:
    return None if inplace else {"activation": "relu"}


def _leaky_relu(input, negative_slope=0.01, inplace=False) -> dict[str, Any] | None:
    if inplace or negative_slope < 0:
        return None
    return {"activation": "leaky_relu", "slope": negative_slope}


def _gelu(input, *, approximate="none") -> dict[str, Any] | None:
    return {"activation": "gelu"} if approximate == "none" else None


def _silu(input, inplace=False) -> dict[str, Any] | None:
    return None if inplace else {"activation": "silu"}


def _all(value, size: int) -> bool:
    return all(v == size for v in value) if isinstance(value, (tuple, list)) else value == size


def _max_pool2d(
    input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
) -> dict[str, Any] | None:
    plain = _all(padding, 0) and _all(dilation, 1) and not ceil_mode and not return_indices
    return {"pool": "max"} if plain and _all(kernel_size, 2) and (not stride or _all(stride, 2)) else None


def _avg_pool2d(
    input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
) -> dict[str, Any] | None:
    plain = _all(padding, 0) and not ceil_mode and divisor_override in (None, 4)
    return {"pool": "average"} if plain and _all(kernel_size, 2) and (not stride or _all(stride, 2)) else None


Asked = Callable[..., dict[str, Any] | None]
NORMS: dict[Callable, Asked] = {
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.group_norm: _group_norm,
}
ACTIVATIONS: dict[Callable, Asked] = {
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    F.leaky_relu: _leaky_relu,
    F.gelu: _gelu,
    F.silu: _silu,
}
POOLS: dict[Callable, Asked] = {F.max_pool2d: _max_pool2d, torch.max_pool2d: _max_pool2d, F.avg_pool2d: _avg_pool2d}
