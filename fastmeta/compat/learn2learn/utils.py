"""What `learn2learn.utils` has: copies of modules that stay in the graph, and updates of their parameters in it.

Where it differs from 0.2.0: a module under `torch.compile` is cloned as the module inside, since a compiled copy would
compute with the first one's weights and without second derivatives; `update_module` passes over children that are None;
`detach_distribution` keeps modules, there it loses them; `clone_distribution` also copies distributions whose tensors
have a graph.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import warnings

import torch
from torch import Tensor, nn

from ._partition import partition_task

__all__ = [
    "accuracy",
    "clone_distribution",
    "clone_module",
    "clone_named_parameters",
    "clone_parameters",
    "detach_distribution",
    "detach_module",
    "flatten_config",
    "magic_box",
    "partition_task",
    "update_module",
    "warn_once",
]


def magic_box(x):
    """`exp(x - x.detach())`, which is 1 and has the gradient of `x` (Foerster et al. 2018, "DiCE"); what is no tensor
    comes back as it is."""
    return torch.exp(x - x.detach()) if isinstance(x, Tensor) else x


def clone_parameters(param_list) -> list[Tensor]:
    return [p.clone() for p in param_list]


def clone_named_parameters(param_dict) -> dict[str, Tensor]:
    return {name: p.clone() for name, p in param_dict.items()}


def clone_module(module, memo: dict | None = None):
    """A copy of `module` whose parameters, and buffers that require gradients, are `clone()`s: gradients of the copy
    reach the original.

    Other buffers and attributes are shared with the original. A parameter that stands in several places is cloned once;
    `memo`, from tensors to their clones, holds what was cloned. What is no module comes back as it is.
    """
    memo = {} if memo is None else memo
    module = _as_written(module)
    if not isinstance(module, nn.Module):
        return module
    clone = module.__new__(type(module))
    # past the __setattr__ of modules that look at themselves in it, which the clone cannot yet do
    object.__setattr__(clone, "__dict__", module.__dict__.copy())
    own = clone.__dict__
    for kind in ("_parameters", "_buffers", "_modules"):
        own[kind] = own[kind].copy()
    if own.get("_compiled_call_impl") is not None:  # bound to the original
        own["_compiled_call_impl"] = None
    for name, p in own["_parameters"].items():
        if p is not None:
            own["_parameters"][name] = _cloned_once(p, memo)
    for name, buffer in own["_buffers"].items():
        if buffer is not None and buffer.requires_grad:
            own["_buffers"][name] = _cloned_once(buffer, memo)
    for name, child in own["_modules"].items():
        own["_modules"][name] = clone_module(child, memo)
    _gather_recurrent_weights(clone)
    return clone


def _as_written(module):
    """The module that `torch.compile(module)` wraps; any other is itself."""
    while isinstance(module, nn.Module) and "_orig_mod" in module._modules:
        module = module._modules["_orig_mod"]
    return module


def _cloned_once(tensor: Tensor, memo: dict) -> Tensor:
    if tensor not in memo:
        memo[tensor] = tensor.clone()
    return memo[tensor]


def _gather_recurrent_weights(module: nn.Module) -> None:
    """Recurrent layers keep a list of their weights beside `_parameters`."""
    if not hasattr(type(module), "flatten_parameters"):
        return
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
    else:
        module._apply(lambda t: t)


def detach_module(module, keep_requires_grad: bool = False) -> None:
    """Cut the parameters of a clone, and its buffers that require gradients, off their graph, in place.

    They no longer require gradients; with `keep_requires_grad` those that did still do, as leaves.
    """
    if not isinstance(module, nn.Module):
        return
    buffers = (b for b in module._buffers.values() if b is not None and b.requires_grad)
    for tensor in (*(p for p in module._parameters.values() if p is not None), *buffers):
        required = tensor.requires_grad
        tensor.detach_()
        if keep_requires_grad and required:
            tensor.requires_grad_()
    for child in module._modules.values():
        detach_module(child, keep_requires_grad)


def clone_distribution(dist):
    """A copy of a distribution whose tensors that require gradients are `clone()`s, also in modules and distributions
    that it holds."""
    clone = copy.copy(dist)
    for name, item in dist.__dict__.items():
        if isinstance(item, Tensor):
            clone.__dict__[name] = item.clone()
        elif isinstance(item, nn.Module):
            clone.__dict__[name] = clone_module(item)
        elif isinstance(item, torch.distributions.Distribution):
            clone.__dict__[name] = clone_distribution(item)
        else:
            clone.__dict__[name] = copy.deepcopy(item)
    return clone


def detach_distribution(dist):
    """Cut off the graph, in place, what `clone_distribution` clones; returns `dist`."""
    for name, item in dist.__dict__.items():
        if isinstance(item, Tensor):
            if item.requires_grad:
                dist.__dict__[name] = item.detach()
        elif isinstance(item, nn.Module):
            detach_module(item)
        elif isinstance(item, torch.distributions.Distribution):
            detach_distribution(item)
    return dist


def update_module(module, updates=None, memo: dict | None = None):
    """Replace every parameter `p` of `module` by the tensor `p + update`, in the graph; returns the same module.

    Args:
        module: the module, changed in place; its old tensors are not.
        updates: one for each of `module.parameters()` in their order; those that are None leave their parameter as it
            is. None: what stands in the attribute `update` of parameters and buffers. With another number of updates
            than parameters a line is printed, and the first ones count.
        memo: from tensors to what replaced them, so that shared ones stay shared.
    """
    memo = {} if memo is None else memo
    if updates is not None:
        parameters = list(module.parameters())
        if len(updates) != len(parameters):
            print(
                "WARNING:update_module(): Parameters and updates have different length. "
                f"({len(parameters)} vs {len(updates)})"
            )
        for p, update in zip(parameters, updates, strict=False):
            p.update = update
    if not isinstance(module, nn.Module):
        return module
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if tensor in memo:
                tensors[name] = memo[tensor]
            elif getattr(tensor, "update", None) is not None:
                tensors[name] = memo[tensor] = tensor + tensor.update
                tensor.update = None
    for child in module._modules.values():
        update_module(child, None, memo)
    _gather_recurrent_weights(module)
    return module


def accuracy(preds: Tensor, targets: Tensor) -> Tensor:
    """The share of rows of `preds` `[B, C]` whose largest entry is at `targets` `[B]`, float32 `[]`."""
    return (preds.argmax(dim=1).long() == targets.long()).sum().float() / preds.size(0)


def flatten_config(args, prefix: str | None = None) -> dict:
    """Nested dataclasses, namespaces and dicts as one dict with keys `"outer.inner"`."""
    if isinstance(args, argparse.Namespace):
        return flatten_config(vars(args), prefix)
    if dataclasses.is_dataclass(args):
        items = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    elif isinstance(args, dict):
        items = args
    else:
        return {prefix: args}
    flat = {}
    for key, value in items.items():
        flat |= flatten_config(value, key if prefix is None else f"{prefix}.{key}")
    return flat


class _WarnOnce:
    """Each message once; `severity` "default", "deprecation", a category, or "error", which raises."""

    def __init__(self):
        self.warned_messages: list[str] = []

    def __call__(self, message: str, severity=None) -> None:
        if message in self.warned_messages:
            return
        if severity == "error":
            raise RuntimeError(message)
        categories = {None: UserWarning, "default": UserWarning, "deprecation": DeprecationWarning}
        warnings.warn(message, category=categories.get(severity, severity), stacklevel=3)
        self.warned_messages.append(message)


warn_once = _WarnOnce()
