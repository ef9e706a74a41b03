"""Checks of what algorithms are made with and called with. Errors name the argument, what came and what is allowed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastmeta._trees import first, named_leaves
from fastmeta.functional import checks

if TYPE_CHECKING:
    from ..tasks import TaskBatch


def check_count(name: str, value: int, least: int) -> int:
    """`value`, if it is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def check_size(name: str, value: int | None, least: int = 1, *, or_none: bool = False) -> int | None:
    """`value`, if it is an int of at least `least`, or None where that has a meaning."""
    if or_none and value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be {'None or ' if or_none else ''}an int of at least {least}, got {value!r}")
    return value


def check_number(name: str, value: float, least: float = float("-inf"), *, open: bool = False) -> float:
    """`value` as a float, if it is a finite number of at least `least`, or above it where the range is open."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not least <= value < float("inf") or (open and value == least):
        raise ValueError(f"{name} must be {'above' if open else 'at least'} {least} and finite, got {value}")
    return float(value)


def check_pair(x_name: str, x: Tensor, y_name: str, y: Tensor) -> None:
    """Raise ValueError unless inputs and targets begin with the same tasks and examples, all tensors in them."""
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        _check_rows(x_name, x, y_name, y)
        return
    inputs = check_inputs(x_name, x)
    targets = dict(named_leaves(y, y_name))
    if not targets:
        raise ValueError(f"{y_name} must hold a tensor [T, B, ...], got {y!r}")
    for name, leaf in targets.items():
        _check_rows(*inputs, name, leaf)


def check_inputs(name: str, x: Tensor) -> tuple[str, Tensor]:
    """The name of the first tensor in inputs, and the tensor; ValueError unless all begin with the same tasks and
    examples."""
    leaves = list(named_leaves(x, name))
    if not leaves:
        raise ValueError(f"{name} must hold a tensor [T, B, ...], got {x!r}")
    for leaf_name, leaf in leaves:
        _check_rows(*leaves[0], leaf_name, leaf)
    return leaves[0]


def _check_rows(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.dim() < 2 or other.dim() < 2 or x.shape[:2] != other.shape[:2]:
        raise ValueError(
            f"{name} and {other_name} must begin with the same tasks and examples, [T, B, ...], "
            f"got {tuple(x.shape)} and {tuple(other.shape)}"
        )


def check_batch(batch: TaskBatch) -> None:
    """Raise ValueError unless inputs and targets of support and query begin with the same tasks and examples."""
    support_x, support_y, query_x, query_y = batch
    check_pair("support_x", support_x, "support_y", support_y)
    check_pair("query_x", query_x, "query_y", query_y)
    support_x, query_x = first(support_x), first(query_x)
    if support_x.shape[0] != query_x.shape[0]:
        raise ValueError(f"support_x has {support_x.shape[0]} tasks, query_x has {query_x.shape[0]}")


def check_weights(weights: Tensor | None, batch: TaskBatch) -> None:
    """Raise TypeError or ValueError unless `weights` is None or holds a number for each task."""
    if weights is None:
        return
    checks.task_weights("weights", weights, "support_x", first(batch[0]))
    checks.same_device("weights", weights, "support_x", first(batch[0]))


def check_width(features: Tensor, width: int) -> None:
    """Raise ValueError unless embeddings `[T, B, D]` have the width that the algorithm was made for."""
    if features.shape[2] != width:
        raise ValueError(f"encoder must return embeddings [B, {width}], got [B, {features.shape[2]}]")


def check_tasks(query_x: Tensor, tasks: int) -> None:
    """Raise ValueError unless there are queries of as many tasks as the state has."""
    if not isinstance(query_x, Tensor):
        _, query_x = check_inputs("query_x", query_x)
    if query_x.shape[0] != tasks:
        raise ValueError(f"query_x has {query_x.shape[0]} tasks, state has {tasks}")
