"""Argument errors, all of one form: the argument, what came, what is allowed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta import values
from fastmeta.values import dtype_of

_passed: set = set()  # calls whose shapes, dtypes and devices have been checked
_MOST_PASSED = 4096

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def key(*parts):
    """What the checks of a call depend on, to look it up in `passed`; None where they must run every time.

    Tensors count by class, shape, dtype, device and layout. Looking takes a fifth of the time of checking, which for
    small tensors is longer than the work.
    """
    if torch.compiler.is_compiling():
        return None
    found = []
    try:
        for part in parts:
            if isinstance(part, Tensor):
                found.append((part.__class__, part.shape, part.dtype, part.device, part.layout))
            elif part.__class__ in (list, tuple):
                found.append(part.__class__)
                for t in part:
                    found.append((t.__class__, t.shape, t.dtype, t.device, t.layout))
            else:
                found.append((part.__class__, part))
        found = (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"), *found)
        hash(found)
    except (AttributeError, TypeError, RuntimeError):  # not tensors, or sizes that are symbols, or no sizes at all
        return None
    return found


def passed(key) -> bool:
    return key is not None and key in _passed


def remember(key) -> None:
    if key is None:
        return
    if len(_passed) >= _MOST_PASSED:
        _passed.clear()
    _passed.add(key)


def tensor(name: str, value, layout: str) -> None:
    """`value` is a floating tensor with the dimensions of `layout`, such as "[T, S, D]"."""
    tensor_of_any_shape(name, value, f" of shape {layout}")
    if value.dim() != layout.count(",") + 1:
        raise ValueError(f"{name} must have shape {layout}, got {list(value.shape)}")


def tensor_of_any_shape(name: str, value, of_shape: str = "") -> None:
    values.tensor(name, value, f"a tensor{of_shape}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {dtype_of(value)}")
    values.on_device(name, value)


def sequence(name: str, value) -> list:
    # a tensor too can be iterated over: its slices would pass for shared layers
    if isinstance(value, (Tensor, str)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a list or tuple of tensors, got {type(value).__name__}")
    return list(value)


def choice_of_tasks(name: str, value: Tensor, tasks: int) -> None:
    """The leading size of `value` is the number of tasks, or 1."""
    if value.shape[0] not in (1, tasks):
        raise ValueError(f"{name} has T = {value.shape[0]} (shape {list(value.shape)}), but the others have {tasks}")


def task_weights(name: str, value, like_name: str, like: Tensor) -> None:
    """`value` is None, or holds a number for each task of `like`."""
    if value is not None:
        tensor(name, value, "[T]")
        same_size(name, value, 0, "T", like_name, like.shape[0])


def labels(name: str, value, layout: str, like: Tensor, like_name: str) -> None:
    """`value` holds int64 class labels, one per row of `like`."""
    values.tensor(name, value, f"an int64 tensor of shape {layout}")
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {dtype_of(value)}")
    if value.shape != like.shape[:2]:
        raise ValueError(
            f"{name} must have shape {layout} = {list(like.shape[:2])} to match {like_name}, got {list(value.shape)}"
        )
    same_device(name, value, like_name, like)


def same_size(name: str, value: Tensor, axis: int, axis_name: str, other_name: str, size: int) -> None:
    if value.shape[axis] != size:
        raise ValueError(
            f"{name} has {axis_name} = {value.shape[axis]} (shape {list(value.shape)}), but {other_name} has {size}"
        )


def same_kind(first_name: str, first: Tensor, **others: Tensor | None) -> None:
    """All tensors have the dtype and device of the first."""
    for name, other in others.items():
        if other is None:
            continue
        if other.dtype != first.dtype:
            raise TypeError(f"{name} is {dtype_of(other)}, but {first_name} is {dtype_of(first)}: they must agree")
        same_device(name, other, first_name, first)


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device}, but {other_name} is on {other.device}: they must agree")


def mask(name: str, value, like: Tensor, like_name: str) -> None:
    """`value` is None, or a bool for each row of `like` `[T, B, ...]`."""
    if value is None:
        return
    values.tensor(name, value, "a bool tensor")
    if value.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {dtype_of(value)}")
    if value.shape != like.shape[:2]:
        raise ValueError(f"{name} must have shape {list(like.shape[:2])}, got {list(value.shape)}")
    same_device(name, value, like_name, like)


def names_of_parameters(params) -> list[str]:
    """What messages call each parameter; the usual trees without pytree's paths, which take longer than the update."""
    if isinstance(params, (list, tuple)) and all(isinstance(p, Tensor) for p in params):
        return [f"params[{i}]" for i in range(len(params))]
    return [f"params{pytree.keystr(path)}" for path, _ in pytree.tree_flatten_with_path(params)[0]]
