"""`higher.utils`: copies of parameters, and structures of hyper-parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def flatten(x: Any) -> list:
    """The leaves of nested dicts, lists, sets and tuples."""
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, (list, set, tuple)):
        return [leaf for part in x for leaf in flatten(part)]
    return [x]


def get_func_params(module: nn.Module, device: torch.device | None = None, safe_copy: bool = True) -> list[Tensor]:
    """The parameters of a module, detached, requiring gradients where they did; copies unless `safe_copy` is False."""
    return [copied(p, device) if safe_copy else moved(p.detach(), p.requires_grad, device) for p in module.parameters()]


def copied(t: Tensor, device: torch.device | None) -> Tensor:
    """A detached copy that requires gradients if `t` does."""
    return moved(t.clone().detach(), t.requires_grad, device)


def moved(t: Tensor, requires_grad: bool, device: torch.device | None) -> Tensor:
    t.requires_grad_(requires_grad)
    return t if device is None else t.to(device)


def _recursive_map(target: Any, map_fn: Callable[[Any], Any]) -> Any:
    """`map_fn` of every leaf of nested dicts, lists, sets and tuples."""
    if isinstance(target, dict):
        return type(target)({key: _recursive_map(value, map_fn) for key, value in target.items()})
    if isinstance(target, (list, set, tuple)):
        return type(target)([_recursive_map(part, map_fn) for part in target])
    return map_fn(target)
