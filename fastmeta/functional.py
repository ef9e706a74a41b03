"""The ops, as functions: drop-in parts for any PyTorch meta-learning code.

Each runs on the fastest backend that can serve its call (C++ on the CPU, CUDA or Triton on the GPU, plain PyTorch
elsewhere), is differentiable twice and more, and works under `torch.func`, `torch.compile` and autocast. Tensors may
have any strides; float32 and float64 run natively everywhere, float16 and bfloat16 on GPU kernels with float32 sums.

Sizes: T tasks, S support rows, Q query rows, N classes ("way"), D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta import _backends, _checks
from fastmeta._backends import ACTIVATIONS, METRICS
from fastmeta._library import plain_call
from fastmeta._spec import leading_size
from fastmeta.fast_weights import MLPFastWeights
from fastmeta.inner_loops import adapt_mlp, meta_loss_mlp
from fastmeta.ops import class_prototypes as _class_prototypes
from fastmeta.ops import contrastive_loss as _contrastive_loss
from fastmeta.ops import fast_weight_update as _fast_weight_update
from fastmeta.ops import functional_mlp as _functional_mlp
from fastmeta.ops import pairwise_distance as _pairwise_distance
from fastmeta.ops import prototypical_loss as _prototypical_loss

__all__ = [
    "adapt_mlp",
    "class_prototypes",
    "contrastive_loss",
    "fast_weight_update",
    "functional_mlp",
    "meta_loss_mlp",
    "pairwise_distance",
    "prototypical_loss",
]


def class_prototypes(embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean embedding of each class of each task (Snell et al. 2017, equation 1).

    Args:
        embeddings: `[T, S, D]`, floating.
        labels: `[T, S]` int64 in [0, num_classes); classes may be unbalanced.
        num_classes: N.

    Returns:
        `[T, N, D]`, dtype of `embeddings`; zeros for a class without rows.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: a shape or device that does not fit, a label out of range.
    """
    key = _checks.key("class_prototypes", embeddings, labels, num_classes)
    if not _checks.passed(key):
        _checks.tensor("embeddings", embeddings, "[T, S, D]")
        _checks.labels("labels", labels, "[T, S]", embeddings, "embeddings")
        _checks.class_count(num_classes)
        _checks.remember(key)
    (embeddings,) = _cast(_class_prototypes.SPEC.autocast, embeddings)
    return _class_prototypes.SPEC(embeddings, labels, num_classes)


def pairwise_distance(query: Tensor, prototypes: Tensor, metric: str = "sqeuclidean") -> Tensor:
    """Distance of every query to every prototype of its task, without a `[T, Q, N, D]` intermediate.

    Args:
        query: `[T, Q, D]`, floating.
        prototypes: `[T, N, D]`, same dtype and device.
        metric: smaller is nearer under each. "sqeuclidean" `sum (q-p)^2` (default), "euclidean" its root, "cosine"
            `1 - q.p / (max(|q|, 1e-8) max(|p|, 1e-8))`, "dot" `-q.p`, "manhattan" `sum |q-p|`.

    Returns:
        `[T, Q, N]`. Under sqeuclidean, euclidean and manhattan never negative, exactly 0 for equal points, and there
        with gradient 0.

    Raises:
        TypeError: a dtype that is not allowed or differs.
        ValueError: a shape or device that does not fit, an unknown metric.
    """
    key = _checks.key("pairwise_distance", query, prototypes, metric)
    known = _checks.passed(key)
    if not known:
        _checks.tensor("query", query, "[T, Q, D]")
        _checks.tensor("prototypes", prototypes, "[T, N, D]")
        _checks.same_size("prototypes", prototypes, 0, "T", "query", query.shape[0])
        _checks.same_size("prototypes", prototypes, 2, "D", "query", query.shape[2])
        _checks.choice("metric", metric, METRICS)
    query, prototypes = _cast(_pairwise_distance.SPEC.autocast, query, prototypes)
    if not known:
        _checks.same_kind("query", query, prototypes=prototypes)
        _checks.remember(key)
    return _pairwise_distance.SPEC(query, prototypes, metric)


def prototypical_loss(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    num_classes: int,
    metric: str = "sqeuclidean",
) -> tuple[Tensor, Tensor]:
    """Loss and accuracy of a Prototypical Network from its embeddings (Snell et al. 2017, algorithm 1), fused.

    Equal to `cross_entropy(-pairwise_distance(query, class_prototypes(support, ...)), query_labels)` per task, with
    nothing of size `[T, Q, N]` kept for the backward.

    Args:
        support: `[T, S, D]`, floating.
        support_labels: `[T, S]` int64 in [0, num_classes); classes may be unbalanced, an absent class has prototype 0.
        query: `[T, Q, D]`, same dtype and device.
        query_labels: `[T, Q]` int64 in [0, num_classes).
        num_classes: N.
        metric: as in `pairwise_distance`.

    Returns:
        loss `[T]`, the mean over the task's queries, and accuracy `[T]` in [0, 1], which has no gradient. Both NaN
        where Q = 0.

    Raises:
        TypeError: a dtype that is not allowed or differs.
        ValueError: a shape or device that does not fit, an unknown metric, a label out of range.
    """
    key = _checks.key("prototypical_loss", support, support_labels, query, query_labels, num_classes, metric)
    known = _checks.passed(key)
    if not known:
        _checks.tensor("support", support, "[T, S, D]")
        _checks.tensor("query", query, "[T, Q, D]")
        _checks.same_size("query", query, 0, "T", "support", support.shape[0])
        _checks.same_size("query", query, 2, "D", "support", support.shape[2])
        _checks.labels("support_labels", support_labels, "[T, S]", support, "support")
        _checks.labels("query_labels", query_labels, "[T, Q]", query, "query")
        _checks.class_count(num_classes)
        _checks.choice("metric", metric, METRICS)
    support, query = _cast(_prototypical_loss.SPEC.autocast, support, query)
    if not known:
        _checks.same_kind("support", support, query=query)
        _checks.remember(key)
    return _prototypical_loss.SPEC(support, support_labels, query, query_labels, num_classes, metric)


def contrastive_loss(first: Tensor, second: Tensor, temperature: float = 0.5, *, normalise: bool = True) -> Tensor:
    """NT-Xent (Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations", equation 1):
    every embedding is to find the other view of its example among all embeddings of the batch.

    The mean over the 2 B embeddings of `logsumexp(s_ij, j != i) - s_i,partner`, where `s` is the cosine similarity over
    `temperature`, and nothing of size `[T, 2 B, 2 B]` is kept for the backward.

    Args:
        first: `[T, B, D]`, floating: one view of the B examples of T independent batches.
        second: `[T, B, D]`, same dtype and device: the other view of the same examples, in the same order.
        temperature: above 0. The paper's section 5.1 tries 0.05 to 1; 0.5 is its default for small images.
        normalise: divide embeddings by their Euclidean norm (of 1e-8 at least); False takes them as they come, and so
            dot products in place of cosines.

    Returns:
        loss `[T]`; 0 where B = 1, and NaN where B = 0.

    Raises:
        TypeError: a dtype that is not allowed or differs.
        ValueError: a shape or device that does not fit, a temperature that is not above 0.
    """
    if not isinstance(temperature, (int, float)) or not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number above 0, got {temperature!r}")
    _checks.tensor("first", first, "[T, B, D]")
    _checks.tensor("second", second, "[T, B, D]")
    for axis, name in enumerate("TBD"):
        _checks.same_size("second", second, axis, name, "first", first.shape[axis])
    first, second = _cast(_contrastive_loss.SPEC.autocast, first, second)
    _checks.same_kind("first", first, second=second)
    embeddings = torch.cat([first, second], 1)
    if normalise:
        embeddings = torch.nn.functional.normalize(embeddings, dim=-1, eps=1e-8)
    return _contrastive_loss.SPEC(embeddings, float(temperature))


def functional_mlp(
    x: Tensor,
    weights: Sequence[Tensor] | MLPFastWeights,
    biases: Sequence[Tensor] | None = None,
    activation: str = "relu",
) -> Tensor:
    """A whole multi-layer perceptron with its weights as arguments, for all tasks in one call.

    `h = activation(h W^T + b)` for every layer, the last one without activation.

    Args:
        x: `[T, B, I]`, floating; the rows of each task. T = 1 with per-task weights gives the same rows to every net.
        weights: one per layer, `[T, O, I]` per task (fast weights) or `[O, I]` shared by the tasks, as
            `nn.Linear.weight`; layers may differ in that. Or the fast weights that `adapt_mlp` returned, which hold
            biases and activation too.
        biases: one per layer, `[T, O]` or `[O]`; None (default) for a net without.
        activation: "relu" (default), "tanh", "sigmoid", "silu", "gelu" (exact), "sine" or "identity".

    Returns:
        `[T, B, O]` with O of the last layer.

    Raises:
        TypeError: a dtype that is not allowed or differs.
        ValueError: shapes or devices that do not fit together, an unknown activation.
    """
    if isinstance(weights, MLPFastWeights):
        return weights(x)
    key = _checks.key("functional_mlp", x, weights, biases, activation)
    known = _checks.passed(key)
    if not known:
        _checks.tensor("x", x, "[T, B, I]")
        weights = _checks.sequence("weights", weights)
        biases = [] if biases is None else _checks.sequence("biases", biases)
        if not weights:
            raise ValueError("weights must hold at least one layer, got none")
        if biases and len(biases) != len(weights):
            raise ValueError(f"biases must hold one per layer = {len(weights)}, got {len(biases)}")
        _checks.choice("activation", activation, ACTIVATIONS)
        for i, weight in enumerate(weights):
            _checks.tensor_of_any_shape(f"weights[{i}]", weight)
        for i, bias in enumerate(biases):
            _checks.tensor_of_any_shape(f"biases[{i}]", bias)
    weights = [_with_tasks(f"weights[{i}]", w, "[O, I]") for i, w in enumerate(weights)]
    biases = [_with_tasks(f"biases[{i}]", b, "[O]") for i, b in enumerate(biases or ())]
    cast = _cast(_functional_mlp.SPEC.autocast, x, *weights, *biases)
    x, weights, biases = cast[0], cast[1 : 1 + len(weights)], cast[1 + len(weights) :]
    if not known:
        _check_layers(x, weights, biases)
        _checks.remember(key)
    return _functional_mlp.SPEC(x, weights, biases, activation)


def _check_layers(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> None:
    tasks = leading_size([x, *weights, *biases])
    _checks.choice_of_tasks("x", x, tasks)
    width = x.shape[2]
    for i, weight in enumerate(weights):
        _checks.same_kind("x", x, **{f"weights[{i}]": weight})
        _checks.choice_of_tasks(f"weights[{i}]", weight, tasks)
        _checks.same_size(f"weights[{i}]", weight, 2, "I", "its input", width)
        width = weight.shape[1]
        if biases:
            _checks.same_kind("x", x, **{f"biases[{i}]": biases[i]})
            _checks.choice_of_tasks(f"biases[{i}]", biases[i], tasks)
            _checks.same_size(f"biases[{i}]", biases[i], 1, "O", f"weights[{i}]", width)


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
    """
    plain = type(params) in (list, tuple) and type(params) is type(grads)
    key = _checks.key("fast_weight_update", params, grads, lr) if plain else None
    plan = _plans.get(key) if key is not None else None
    if plan is None:
        return _planned_update(params, grads, lr, key)
    to_kernel, rates, from_kernel, as_they_are = plan
    lrs = () if isinstance(rates, float) else [lr] * len(params) if isinstance(lr, Tensor) else lr
    tensors, n = (*params, *grads, *lrs), len(params)
    if as_they_are is not None and _backends.forced_backend() is None and plain_call(tensors):
        if all(t.is_contiguous() for t in tensors):
            return type(params)(_backends.run_shaped_update(params, grads, lrs, rates or 0.0, *as_they_are))
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
    names = _names(params)
    for name, p, g in zip(names, flat_params, flat_grads, strict=True):
        _checks.tensor_of_any_shape(name, p)
        _checks.tensor_of_any_shape("grads" + name[6:], g)
    if not flat_params:
        return params
    rates = _rates(lr, structure, flat_params)
    tensors = _cast("widest", *flat_params, *flat_grads)
    same_types = all(a is b for a, b in zip(tensors, (*flat_params, *flat_grads), strict=True))
    flat_params, flat_grads = tensors[: len(flat_params)], tensors[len(flat_params) :]
    tasks = _tasks_of_update(names, flat_params, flat_grads, rates)
    first = flat_params[0]
    p2, g2, r2, shapes = [], [], [], []
    for name, p, g, rate in zip(names, flat_params, flat_grads, rates, strict=True):
        if p.dtype != first.dtype or g.dtype != first.dtype or p.device != first.device or g.device != first.device:
            _checks.same_kind(names[0], first, **{name: p, f"grads{name.removeprefix('params')}": g})
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
    if not _backends.has_shaped_update(spec, (p2, g2, r2, 0.0)):
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


def _names(params) -> list[str]:
    """What messages call each parameter; the usual trees without pytree's paths, which take longer than the update."""
    if isinstance(params, (list, tuple)) and all(isinstance(p, Tensor) for p in params):
        return [f"params[{i}]" for i in range(len(params))]
    return [f"params{pytree.keystr(path)}" for path, _ in pytree.tree_flatten_with_path(params)[0]]


def _rates(lr, structure, params) -> list:
    """One rate per parameter: all the same float, or all tensors."""
    leaves, lr_structure = pytree.tree_flatten(lr)
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            _checks.tensor_of_any_shape("lr", leaf)
        elif isinstance(leaf, bool) or not isinstance(leaf, (int, float)):
            raise TypeError(f"lr must be or hold floats or tensors, got {type(leaf).__name__}")
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


def _with_tasks(name: str, value, layout: str) -> Tensor:
    """`[T, ...]` as it is, and what the tasks share with a leading 1."""
    dims = layout.count(",") + 1
    if value.dim() == dims:
        return value.unsqueeze(0)
    if value.dim() != dims + 1:
        raise ValueError(f"{name} must have shape [T, {layout[1:-1]}] or {layout}, got {list(value.shape)}")
    return value


def _cast(policy: str, *tensors: Tensor) -> list[Tensor]:
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
    return [t if t.dtype == torch.float64 else t.to(wanted) for t in tensors]
