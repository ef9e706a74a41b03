"""What autocast does to the inputs of an op."""

from __future__ import annotations

import torch
from torch import Tensor


def cast(policy: str, *tensors: Tensor | None) -> list[Tensor]:
    """What autocast does to the inputs of this kind of op; nothing outside autocast, and float64 stays."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return list(tensors)
    if policy == "widest":
        wanted = tensors[0].dtype
        for t in tensors[1:]:
            wanted = torch.promote_types(wanted, t.dtype)
    else:
        wanted = torch.get_autocast_dtype(device_type) if policy == "lower" else torch.float32
    return [t if t is None or t.dtype == torch.float64 else t.to(wanted) for t in tensors]
