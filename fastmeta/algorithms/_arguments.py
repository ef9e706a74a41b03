"""Checks of what algorithms are made with and called with. Errors name the argument, what came and what is allowed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastmeta import values
from fastmeta._trees import first, named_leaves
from fastmeta.functional import checks
from fastmeta.values import count as check_count  # noqa: F401
from fastmeta.values import number as check_number  # noqa: F401

if TYPE_CHECKING:
    from ..tasks import TaskBatch


def check_size(name: str, value: int | None, least: int = 1, *, or_none: bool = False) -> int | None:
    """`value`, if it is an int of at least `least`, or None where that has a meaning."""
    if or_none and value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be {'None or ' if or_none else ''}an int of at least {least}, got {value!r}")
    return value


def check_pair(x_name: str, x: Tensor, y_name: str, y: Tensor) -> None:
    """Raise TypeError or ValueError unless inputs and targets are dense and begin with the same tasks and examples, all
    tensors in them."""
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        values.tensor(x_name, x)
        values.tensor(y_name, y)
        _check_rows(x_name, x, y_name, y)
        return
    inputs = check_inputs(x_name, x)
    for name, leaf in _dense_leaves(y_name, y):
        _check_rows(*inputs, name, leaf)


def check_inputs(name: str, x: Tensor) -> tuple[str, Tensor]:
    """The name of the first tensor in inputs, and the tensor; TypeError or ValueError unless all are dense and begin
    with the same tasks and examples."""
    leaves = _dense_leaves(name, x)
    for leaf_name, leaf in leaves:
        _check_rows(*leaves[0], leaf_name, leaf)
    return leaves[0]


def _dense_leaves(name: str, tree) -> list[tuple[str, Tensor]]:
    leaves = list(named_leaves(tree, name))
    if not leaves:
        raise ValueError(f"{name} must hold a tensor [T, B, ...], got {values.shown(tree)}")
    for leaf_name, leaf in leaves:
        values.tensor(leaf_name, leaf)
    return leaves


def _check_rows(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.dim() < 2 or other.dim() < 2 or x.shape[:2] != other.shape[:2]:
        raise ValueError(
            f"{name} and {other_name} must begin with the same tasks and examples, [T, B, ...], "
            f"got {tuple(x.shape)} and {tuple(other.shape)}{_advice(name, x, other)}"
        )


def _advice(name: str, x: Tensor, other: Tensor) -> str:
    if name.endswith("[0]"):
        return "; a list or tuple is the model's several inputs: tasks are one tensor, padded, with a mask of rows"
    if 0 < other.dim() < 2 and len(x) == len(other):
        return "; for a single task put .unsqueeze(0) in front"
    return ""


def check_batch(batch: TaskBatch) -> None:
    """Raise ValueError unless inputs and targets of support and query begin with the same tasks and examples."""
    support_x, support_y, query_x, query_y = batch[:4]
    check_pair("support_x", support_x, "support_y", support_y)
    check_pair("query_x", query_x, "query_y", query_y)
    support_x, query_x = first(support_x), first(query_x)
    if support_x.shape[0] != query_x.shape[0]:
        raise ValueError(f"support_x has {support_x.shape[0]} tasks, query_x has {query_x.shape[0]}")
    checks.same_kind("support_x", support_x, query_x=query_x)


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
    """Raise TypeError or ValueError unless there are queries of as many tasks as the state has."""
    if not isinstance(query_x, Tensor):
        _, query_x = check_inputs("query_x", query_x)
    values.tensor("query_x", query_x)
    if query_x.dim() < 2:
        raise ValueError(f"query_x must have shape [T, Q, ...], got {list(query_x.shape)}")
    if query_x.shape[0] != tasks:
        raise ValueError(f"query_x has {query_x.shape[0]} tasks, state has {tasks}")
