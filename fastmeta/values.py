"""Checks of what users give: numbers, flags, choices, modules, and whether a tensor is of a kind that is read here.

Each returns the value, or raises a TypeError or ValueError of one form: the argument, what came, what is allowed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

_LARGEST = sys.float_info.max
_DEVICES = ("cpu", "cuda")
_LAYOUTS = {torch.sparse_coo: "sparse", torch._mkldnn: "mkldnn", torch.jagged: "nested"}


def shown(value: Any) -> str:
    """`value` as it is written, if that is short, else what it is."""
    return repr(value) if value is None or isinstance(value, (str, int, float)) else f"{type(value).__name__}"


def count(name: str, value: int, least: int = 1) -> int:
    """An int of at least `least`, or a symbol for one while a call is traced."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def counts(name: str, value: Sequence[int], fewest: int = 0) -> tuple[int, ...]:
    """A list or tuple of at least `fewest` ints of at least 1."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list or tuple of ints, got {shown(value)}")
    if len(value) < fewest:
        raise ValueError(f"{name} must hold at least {fewest} numbers, got {list(value)}")
    return tuple(count(f"{name}[{i}]", size) for i, size in enumerate(value))


def number(
    name: str, value: float, least: float = float("-inf"), *, open: bool = False, below: float | None = None
) -> float:
    """A finite number of at least `least`, or above it where the range is open, and below `below`; as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{name} must be finite, got {value}")
    if value < least or (open and value == least):
        raise ValueError(f"{name} must be {'above' if open else 'at least'} {least}, got {value}")
    if below is not None and value >= below:
        raise ValueError(f"{name} must be below {below}, got {value}")
    return float(value)


def flag(name: str, value: bool) -> bool:
    """True or False."""
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return value


def choice(name: str, value: Any, allowed: Sequence[str | None]) -> Any:
    """One of `allowed`."""
    if not (value is None or isinstance(value, str)) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; got {shown(value)}")
    return value


def name(name: str, value: str) -> str:
    """A text."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a name, got {shown(value)}")
    return value


def seed(name: str, value: int) -> int:
    """An int that random generators take."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must lie in [-2^63, 2^63), got {value}")
    return value


def module(name: str, value: nn.Module) -> nn.Module:
    """A module, made already."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {_kind(value)}")
    return value


def path(name: str, value: str | PathLike, *, or_none: bool = False) -> str | PathLike:
    """The name of a file or folder."""
    if not isinstance(value, (str, PathLike)) and not (or_none and value is None):
        raise TypeError(f"{name} must be a path{' or None' if or_none else ''}, got {type(value).__name__}")
    return value


def function(name: str, value: Callable, *, or_none: bool = False) -> Callable:
    """What can be called."""
    if not callable(value) and not (or_none and value is None):
        raise TypeError(f"{name} must be a function{' or None' if or_none else ''}, got {shown(value)}")
    return value


def device(name: str, value: str | int | torch.device, *, here: bool = True) -> torch.device:
    """The CPU or a CUDA device, one that is there if it is to be used `here`."""
    if isinstance(value, bool) or not isinstance(value, (str, int, torch.device)):
        raise TypeError(f"{name} must be the name of a device or a torch.device, got {type(value).__name__}")
    try:
        found = torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"{name} must be 'cpu', 'cuda' or 'cuda:<number>', got {value!r}") from error
    if found.type not in _DEVICES:
        raise ValueError(f"{name} must be the CPU or a CUDA device, got {found}")
    try:
        torch.empty(0, device=found if here else "cpu")
    except (RuntimeError, AssertionError) as error:  # a torch built without CUDA raises AssertionError
        raise ValueError(f"{name} {found} cannot be used: {str(error).splitlines()[0]}") from error
    return found


def generator(name: str, value: torch.Generator | None, device: torch.device) -> torch.Generator | None:
    """None, or a generator of `device`."""
    if value is None:
        return None
    if not isinstance(value, torch.Generator):
        raise TypeError(f"{name} must be a torch.Generator or None, got {type(value).__name__}")
    if value.device != device and value.device.type != device.type:  # names take longer to read than devices
        raise ValueError(f"{name} is of {value.device}, but what it draws lies on {device}: they must agree")
    return value


def tensor(name: str, value: Tensor, what: str = "a tensor") -> Tensor:
    """A tensor that holds all its numbers, one after the other: not sparse, nested, quantized or of another library."""
    if not isinstance(value, Tensor):
        advice = ": give torch.as_tensor of it" if hasattr(value, "__array__") else ""
        raise TypeError(f"{name} must be {what}, got {type(value).__name__}{advice}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else _LAYOUTS.get(value.layout, "sparse")
        how = "torch.nested.to_padded_tensor, and a mask" if kind == "nested" else f"{name}.to_dense()"
        raise TypeError(f"{name} must be a dense tensor, got a {kind} one: give {how}")
    if value.is_quantized:
        raise TypeError(f"{name} must not be quantized, got {dtype_of(value)}: give {name}.dequantize()")
    return value


def on_device(name: str, value: Tensor) -> Tensor:
    """A tensor with numbers in it."""
    if value.device.type not in _DEVICES:
        raise ValueError(f"{name} must be on the CPU or a CUDA device, got {value.device}")
    return value


def dtype_of(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
