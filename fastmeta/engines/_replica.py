"""A module to look at in place of a user's: it computes the same with the same parameters, and running it leaves no
trace in the other."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def replica(model: nn.Module) -> nn.Module:
    """`model` with layers of its own that share the parameters: buffers are copies, attributes that `forward` writes
    are its own, and hooks are not called, but for those by which torch computes a weight (`torch.nn.utils.prune`)."""
    layers = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    made = {id(layer): object.__new__(type(layer)) for layer in layers}
    for layer in layers:
        attributes = {key: _moved(value, made) for key, value in layer.__dict__.items()}
        attributes["_modules"] = {key: _moved(child, made) for key, child in layer._modules.items()}
        attributes["_buffers"] = {k: None if b is None else b.detach().clone() for k, b in layer._buffers.items()}
        for hooks in _HOOKS:
            kept = {key: hook for key, hook in layer.__dict__[hooks].items() if _computes_a_weight(hook)}
            attributes[hooks] = type(layer.__dict__[hooks])(kept)
        made[id(layer)].__dict__.update(attributes)
    return made.get(id(model), model)


def _computes_a_weight(hook: Any) -> bool:
    return type(hook).__module__.startswith("torch.nn.utils.")


def _moved(value: Any, made: dict[int, nn.Module]) -> Any:
    """An attribute's value, with the layers made anew in place of the others and containers of its own."""
    if isinstance(value, nn.Module):
        return made.get(id(value), value)
    if isinstance(value, MethodType) and id(value.__self__) in made:
        return MethodType(value.__func__, made[id(value.__self__)])
    if type(value) in (list, tuple, set):
        return type(value)(_moved(one, made) for one in value)
    if type(value) is dict:
        return {key: _moved(one, made) for key, one in value.items()}
    return value
