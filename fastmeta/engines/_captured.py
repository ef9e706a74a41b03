"""The tensors that a function holds on to: what autograd would reach through it, and nobody handed in."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

_DEPTH = 8  # of containers in containers
_LONGEST = 1000  # of a container that is looked through: longer ones hold data


def captured(function: Callable) -> list[Tensor]:
    """Tensors that require gradients and that `function` has in its closure, its defaults, its bound arguments or its
    object; each once. Not those that it finds under global names."""
    return [tensor for tensor in _held(function, _DEPTH, set()) if tensor.requires_grad]


def _held(value: Any, depth: int, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif depth and not isinstance(value, (type, types.ModuleType)):
        for part in _parts(value):
            yield from _held(part, depth - 1, seen)


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # an empty cell
                continue
        yield from (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    elif isinstance(value, nn.Module):
        yield from value.parameters()
    elif isinstance(value, (Mapping, list, tuple)):
        if len(value) <= _LONGEST:
            yield from value.values() if isinstance(value, Mapping) else value
    elif hasattr(value, "__dict__"):
        yield from vars(value).values()
