"""Inner steps on parameters of any structure."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta import values
from fastmeta.dispatch import backends
from fastmeta.dispatch.library import plain_or_graph
from fastmeta.dispatch.spec import leading_size
from fastmeta.ops import fast_weight_update as _fast_weight_update

from . import checks
from .autocast import cast
from .second_order import refuse_compiled


def fast_weight_update(params: Any, grads: Any, lr: Any) -> Any:
    """One inner step, `params - lr * grads`, for all parameters of all tasks in one launch (Finn et al. 2017, eq. 1).

    Args:
        params: a tensor or any pytree of them (list, dict, ...); each per task `[T, *shape]`, or `[*shape]` where the
            tasks share it, as slow weights do in the first step.
        grads: the same structure; each `[T, *shape]` or `[*shape]`.
        lr: a float or a tensor with one element; `[T]`, a rate per task; or the structure of `params` with, for each
            parameter, a float, a tensor with one element (per tensor), `[*shape]` (per element, as in Meta-SGD, Li et
            al. 2017, equation 2) or `[T, *shape]` (per element and task).

    Returns:
        The structure of `params`; each `[T, *shape]`, or `[*shape]` where neither params, grads nor lr has a task
        dimension. Differentiable with respect to all three.

    Raises:
        TypeError: a dtype that is not allowed or differs.
        ValueError: structures, shapes or devices that do not fit together.
        RuntimeError: gradients of a compiled loss, taken with a graph: their own gradients would be wrong.
    """
    refuse_compiled(grads, params)
    plain = type(params) in (list, tuple) and type(params) is type(grads)
    key = checks.key("fast_weight_update", params, grads, lr) if plain else None
    plan = _plans.get(key) if key is not None else None
    if plan is None:
        return _planned_update(params, grads, lr, key)
    to_kernel, rates, from_kernel, as_they_are = plan
    lrs = () if isinstance(rates, float) else [lr] * len(params) if isinstance(lr, Tensor) else lr
    tensors, n = (*params, *grads, *lrs), len(params)
    if as_they_are is not None and backends.forced_backend() is None and plain_or_graph(tensors):
        if torch.is_grad_enabled() and any([t.requires_grad for t in tensors]):
            if rates is not None:  # one node of the graph, in place of a reshape and back for every tensor
                whole = [p.contiguous() for p in params]  # the result takes their strides
                return type(params)(torch._foreach_add(whole, grads, alpha=-rates))
        elif all([t.is_contiguous() for t in tensors]):
            return type(params)(backends.run_shaped_update(params, grads, lrs, rates or 0.0, *as_they_are))
    flat = [t if shape is None else t.reshape(shape) for t, shape in zip(tensors, to_kernel, strict=True)]
    outs = _fast_weight_update.SPEC(flat[:n], flat[n : 2 * n], flat[2 * n :], rates or 0.0)
    return type(params)(
        out if shape is None else out.reshape(shape) for out, shape in zip(outs, from_kernel, strict=True)
    )


# of updates whose arguments have been checked: shapes to the kernel, the rate, shapes from the kernel, `_as_they_are`
_plans: dict = {}


def _planned_update(params: Any, grads: Any, lr: Any, key) -> Any:
    """Checks everything, updates, and leaves a plan under `key`."""
    flat_params, structure = pytree.tree_flatten(params)
    flat_grads, grad_structure = pytree.tree_flatten(grads)
    if grad_structure != structure:
        raise ValueError(f"grads must have the structure of params, {structure}, got {grad_structure}")
    names = checks.names_of_parameters(params)
    for name, p, g in zip(names, flat_params, flat_grads, strict=True):
        checks.tensor_of_any_shape(name, p)
        checks.tensor_of_any_shape("grads" + name[6:], g)
    if not flat_params:
        return params
    rates = _rates(lr, structure, flat_params)
    tensors = cast("widest", *flat_params, *flat_grads)
    same_types = all(a is b for a, b in zip(tensors, (*flat_params, *flat_grads), strict=True))
    flat_params, flat_grads = tensors[: len(flat_params)], tensors[len(flat_params) :]
    tasks = _tasks_of_update(names, flat_params, flat_grads, rates)
    first = flat_params[0]
    p2, g2, r2, shapes = [], [], [], []
    for name, p, g, rate in zip(names, flat_params, flat_grads, rates, strict=True):
        if p.dtype != first.dtype or g.dtype != first.dtype or p.device != first.device or g.device != first.device:
            checks.same_kind(names[0], first, **{name: p, f"grads{name.removeprefix('params')}": g})
        per_task = tasks is not None
        shape = (p if p.dim() < g.dim() else g).shape
        if per_task and p.dim() == g.dim() and not _only_rate_is_per_task(p, g, rate):
            shape = shape[1:]
        p2.append(_flatten(p, per_task and p.dim() > len(shape)))
        g2.append(_flatten(g, per_task and g.dim() > len(shape)))
        if isinstance(rate, Tensor):
            per_task_first = isinstance(lr, Tensor)
            if per_task_first and structure.is_leaf() and rate.numel() > 1 and rate.shape == shape == (tasks,):
                raise ValueError(
                    f"lr of shape [{tasks}] may be a rate per task or per element of params {list(p.shape)}: give it "
                    "shape [T, *shape], or put params in a list, and lr too if it is per element"
                )
            converted = rate.to(first)
            same_types = same_types and converted is rate
            r2.append(_flatten_rate(name, converted, shape, tasks, per_task_first))
        shapes.append(shape)
    if not r2:
        outs = _fast_weight_update.SPEC(p2, g2, [], float(rates[0]))
    else:
        outs = _fast_weight_update.SPEC(p2, g2, r2, 0.0)
    given = [*flat_params, *flat_grads, *(rates if r2 else ())]
    to_kernel = [None if t.shape == k.shape else k.shape for t, k in zip(given, (*p2, *g2, *r2), strict=True)]
    from_kernel = [
        None if tasks is not None and len(shape) == 1 else shape if tasks is None else (out.shape[0], *shape)
        for out, shape in zip(outs, shapes, strict=True)
    ]
    tensors_as_rates = isinstance(lr, Tensor) or type(lr) in (list, tuple) and all(map(torch.is_tensor, lr))
    if key is not None and same_types and (not r2 or tensors_as_rates):
        if len(_plans) >= 1024:
            _plans.clear()
        as_they_are = _as_they_are(given, p2, g2, r2, outs, from_kernel)
        _plans[key] = (to_kernel, None if r2 else float(rates[0]), from_kernel, as_they_are)
    outs = [out if shape is None else out.reshape(shape) for out, shape in zip(outs, from_kernel, strict=True)]
    return pytree.tree_unflatten(outs, structure)


def _as_they_are(given, p2, g2, r2, outs, from_kernel) -> tuple[int, list[int]] | None:
    """Tasks and columns, if the C++ kernel reads the tensors as given as it reads what they are reshaped to: every
    reshape takes longer than the update of a small tensor."""
    tasks, columns = leading_size([*p2, *g2, *r2]), [p.shape[1] for p in p2]
    spec, n = _fast_weight_update.SPEC, len(p2)
    if not backends.has_shaped_update(spec, (p2, g2, r2, 0.0)):
        return None
    for i, (t, matrix) in enumerate(zip(given, (*p2, *g2, *r2), strict=True)):
        size, width = t.numel(), columns[i % n]
        read = (tasks, width) if size == tasks * width else (1, width) if size == width else (size, 1)
        if read != tuple(matrix.shape):
            return None
    for p, g, width, out, shape in zip(given, given[n:], columns, outs, from_kernel, strict=False):
        whole = p if p.numel() == tasks * width else g
        if whole.shape != (out.shape if shape is None else shape):
            return None
    return tasks, columns


def _rates(lr, structure, params) -> list:
    """One rate per parameter: all the same float, or all tensors."""
    leaves, lr_structure = pytree.tree_flatten(lr)
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            checks.tensor_of_any_shape("lr", leaf)
        elif isinstance(leaf, bool) or not isinstance(leaf, (int, float)):
            raise TypeError(f"lr must be or hold floats or tensors, got {type(leaf).__name__}")
        else:
            values.number("lr", leaf)
    if isinstance(lr, Tensor):
        if lr.dim() > 1 and lr.numel() != 1 and not structure.is_leaf():
            raise ValueError(
                f"lr as one tensor must have one element or shape [T], got {list(lr.shape)}; for a rate per element "
                "give it the structure of params"
            )
        return [lr] * len(params)
    if isinstance(lr, (int, float)):
        return [float(lr)] * len(params)
    if lr_structure != structure:
        raise ValueError(
            f"lr must be a float, a tensor, or have the structure of params, {structure}; got {lr_structure}"
        )
    if not any(isinstance(leaf, Tensor) for leaf in leaves) and len(set(leaves)) == 1:
        return [float(leaf) for leaf in leaves]
    # float64: float32 would round a rate before float64 parameters see it
    return [leaf if isinstance(leaf, Tensor) else torch.tensor(float(leaf), dtype=torch.float64) for leaf in leaves]


def _only_rate_is_per_task(p: Tensor, g: Tensor, rate) -> bool:
    """The tasks share the parameter and its gradient, but each element of each task has its own rate."""
    return isinstance(rate, Tensor) and rate.numel() != 1 and p.dim() > 0 and rate.shape[1:] == p.shape == g.shape


def _tasks_of_update(names, params, grads, rates) -> int | None:
    """T, or None where nothing has a task dimension that matters."""
    found: dict[str, int] = {}
    for name, p, g, rate in zip(names, params, grads, rates, strict=True):
        if p.shape != g.shape and p.shape != g.shape[1:] and g.shape != p.shape[1:]:
            raise ValueError(
                f"grads{name.removeprefix('params')} must have the shape of {name} = {list(p.shape)}, with or without "
                f"a leading task dimension, got {list(g.shape)}"
            )
        if p.dim() != g.dim():
            found[name] = p.shape[0] if p.dim() > g.dim() else g.shape[0]
        elif _only_rate_is_per_task(p, g, rate):
            found[name] = rate.shape[0]
        elif isinstance(rate, Tensor) and rate.numel() != 1 and rate.shape != p.shape and p.dim():
            if rate.shape != p.shape[1:] and rate.shape != p.shape[:1]:
                raise ValueError(
                    f"lr for {name} must have one element, shape [T], or the shape of one task's parameter, got "
                    f"{list(rate.shape)} for a parameter of shape {list(p.shape)}"
                )
            found[name] = p.shape[0]
    if not found:
        return None
    tasks = next(iter(found.values()))
    for name, p, g in zip(names, params, grads, strict=True):
        here = found.get(name, p.shape[0] if p.dim() and p.shape == g.shape else tasks)
        if p.dim() == g.dim() == 0:
            raise ValueError(
                f"{name} and its gradient have no task dimension (shape []), but the others have {tasks} tasks"
            )
        if here != tasks:
            raise ValueError(
                f"{name} and its gradient have T = {here} (shapes {list(p.shape)} and {list(g.shape)}), but the others "
                f"have {tasks}"
            )
    return tasks


def _flatten(value: Tensor, per_task: bool) -> Tensor:
    if value.dim() == 2 and per_task:
        return value
    # not -1: it is undefined where a size is 0
    rows = value.shape[0] if per_task else 1
    columns = 1
    for size in value.shape[1:] if per_task else value.shape:
        columns *= size
    return value.reshape(rows, columns)


def _flatten_rate(name: str, rate: Tensor, shape, tasks: int | None, per_task_first: bool) -> Tensor:
    """`per_task_first`: `[T]` is a rate per task even where a parameter has T elements."""
    if rate.numel() == 1:
        return rate.reshape(1, 1)
    per_task = tasks is not None and rate.shape == (tasks,)
    if rate.shape == shape and not (per_task and per_task_first):
        return _flatten(rate, False)
    if per_task:
        return rate.reshape(tasks, 1)
    if tasks is not None and rate.shape == (tasks, *shape):
        return _flatten(rate, True)
    raise ValueError(
        f"lr for {name} must have one element, shape [T], [*shape] or [T, *shape] with T = {tasks}, shape = "
        f"{list(shape)}; got {list(rate.shape)}"
    )
