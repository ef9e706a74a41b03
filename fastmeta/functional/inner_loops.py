"""Whole inner loops of multi-layer perceptrons: `K` steps of gradient descent on every task's support rows, and what
the fast weights make of the query rows, in one differentiable call.

The gradient of either function is the exact one, through all steps, in one backward pass of the op's own: memory grows
with the rows, not with `K` copies of the weights (docs/inner-loops.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmeta import values
from fastmeta.dispatch.backends import ACTIVATIONS, LOSSES
from fastmeta.dispatch.constants import filled
from fastmeta.dispatch.library import check_data
from fastmeta.ops import _inner_loop
from fastmeta.ops import adapt_mlp as _adapt_mlp
from fastmeta.ops import meta_loss_mlp as _meta_loss_mlp

from . import checks
from .fast_weights import MLPFastWeights

FORMS = ("auto", "lowrank", "onchip")
NORMS = (None, "layer", "batch")
_HALF = (torch.float16, torch.bfloat16)
_NORM_EPSILON = 1e-5


class MetaLoss(NamedTuple):
    """What `meta_loss_mlp` returns."""

    loss: Tensor  # [T]
    logits: Tensor  # [T, Q, C]


class FirstLayerCost(NamedTuple):
    """Multiplications and additions of the first layer for one task, forward and backward, in either form."""

    onchip: float
    lowrank: float


def first_layer_cost(rows: int, queries: int, width_in: int, width_out: int, steps: int) -> FirstLayerCost:
    """What either form costs; all other layers cost the same in both (docs/inner-loops.md, "Which form")."""
    layer = width_in * width_out
    # each step: product and update, both again in the backward, product and gradient of the tangents; three for queries
    onchip = 12 * steps * rows * layer + 6 * queries * layer
    shared = 4 * (rows + queries) * layer + 2 * (rows + queries) * rows * width_in
    lowrank = shared + 8 * steps * rows * rows * width_out + 6 * queries * rows * width_out
    return FirstLayerCost(onchip, lowrank)


def adapt_mlp(
    support_x: Tensor,
    support_y: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    *,
    lr,
    steps: int,
    loss: str = "cross_entropy",
    activation: str = "relu",
    first_order: bool = False,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    norm: str | None = None,
    support_mask: Tensor | None = None,
    huber_delta: float = 1.0,
    form: str = "auto",
) -> MLPFastWeights:
    """Fast weights of every task after `steps` steps of gradient descent (Finn et al. 2017, algorithm 1).

    Args:
        support_x: `[T, S, I]`, floating. In float16 and bfloat16 all is computed in float32.
        support_y: `[T, S]` int64 for cross-entropy, else `[T, S, C]` floating; trajectories for "maximum_entropy"
            (below). Has no gradient.
        weights: one per layer, `[O, I]` shared by the tasks or `[T, O, I]`, as `nn.Linear.weight`.
        biases: one per layer, `[O]` or `[T, O]`; None for a net without.
        lr: inner rate: a float; a tensor `[]`, `[L]` (per layer), `[K]` (per step), `[L, K]` (1 for either repeats; so
            written where K is L, where a vector could mean both); or per element (Meta-SGD) a pair
            `(weight_rates, bias_rates)` of lists in the shapes of weights and biases.
        steps: K, 0 and up.
        loss: "cross_entropy", "mse", "binary_cross_entropy" (of logits) or "huber", means over rows and outputs; or
            "maximum_entropy".
        activation: as in `functional_mlp`, after every layer but the last.
        first_order: inner gradients count as constants, and so nothing depends on support_x.
        momentum: of the inner steps, `m <- momentum m + gradient`; default 0.
        weight_decay: adds `weight_decay * w` to the inner gradient; default 0.
        norm: None, "layer" (over the features of a row) or "batch" (over the task's own rows), without parameters,
            after every layer but the last, before its activation. In plain PyTorch: the kernels have none.
        support_mask: bool `[T, S]`, False for rows that are padding; a task without rows stays as it is. For
            "maximum_entropy" a state whose reward counts for nothing.
        huber_delta: where the Huber loss turns from square to linear.
        form: how the first layer's fast weights are held: "lowrank" (coefficients of the support rows), "onchip" (as
            they are), or "auto" by cost.

    "maximum_entropy" learns rewards (C = 1) of states, the rows, from d demonstrations (Ziebart et al. 2008, equation
    4), each with M sampled trajectories from where it starts, which estimate the partition function (Finn, Levine and
    Abbeel 2016, equation 2). Targets `[T, d, 1 + M]`: rows are the states of all trajectories in order, as many for
    each, every demonstration before its samples; a target is the trajectory's log-probability under the proposal less
    that under the uncontrolled dynamics, of a demonstration 0. Targets `[T, S, d, 1 + M]`: rows are the states that
    there are and targets count every trajectory's visits to them; the last row is none, its reward means nothing and
    its targets are those log-probabilities.

    Returns:
        `MLPFastWeights`; differentiable with respect to weights, biases, rates and support_x.

    Raises:
        TypeError: a dtype that is not allowed or differs.
        ValueError: shapes or devices that do not fit together, an unknown choice, a label out of range, a form that
            cannot serve the call.
    """
    loop = _Loop(support_x, support_y, None, weights, biases, lr, steps, loss, activation, momentum, weight_decay, norm,
                 support_mask, form, first_order, huber_delta)  # fmt: skip
    shared = (loop.rates, loop.element_rates, loss, activation, huber_delta, momentum, weight_decay, first_order)
    x, gram = loop.first_layer(loop.support_x)
    args = (x, loop.support_y, loop.support_weight, gram, loop.kernel_weights, loop.kernel_biases, *shared)
    if norm:
        check_data(_adapt_mlp.SPEC, args)
    fast = _inner_loop.adapt(*args, norm=_norm(norm)) if norm else _adapt_mlp.SPEC(*args)
    low_rank = None
    if loop.lowrank:
        (weight,), biases = _with_tasks(loop.weights[:1], 3), _with_tasks(loop.biases[:1], 2)
        first = (weight, biases[0] if biases else None, fast[2], loop.steps_x)
        low_rank = tuple(None if t is None else t.to(loop.dtype) for t in first)
    layers = ([t.to(loop.dtype) for t in group] for group in fast[:2])
    return MLPFastWeights(*layers, activation, low_rank, _norm(norm))


def meta_loss_mlp(
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    *,
    lr,
    steps: int,
    loss: str = "cross_entropy",
    activation: str = "relu",
    first_order: bool = False,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    norm: str | None = None,
    support_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    task_weights: Tensor | None = None,
    huber_delta: float = 1.0,
    form: str = "auto",
) -> MetaLoss:
    """Query loss of every task at the fast weights that `adapt_mlp` would give: MAML's objective (Finn et al. 2017,
    equation 1), with the exact second-order meta-gradient as its backward.

    Args:
        query_x: `[T, Q, I]`, floating.
        query_y: as `support_y`. Has no gradient.
        query_mask: bool `[T, Q]`, False for rows that are padding; a task without rows has loss 0.
        task_weights: `[T]` (`weights` are the layers here), dtype and device of `support_x`, may require a gradient:
            each task's query loss is multiplied with its own, so that `loss.mean()` is their weighted mean. Default
            None, all 1.

    The others as in `adapt_mlp`.

    Returns:
        `(loss [T], logits [T, Q, C])`, differentiable with respect to weights, biases, rates, support_x and query_x;
        the loss, times `task_weights`, at least in float32.

    Raises:
        TypeError, ValueError: as `adapt_mlp`.
    """
    (found, logits), _ = _meta_loss_mlp_and_mean(
        support_x, support_y, query_x, query_y, weights, biases, lr, steps, loss, activation, first_order, task_weights,
        momentum, weight_decay, norm, support_mask, query_mask, huber_delta, form, False
    )  # fmt: skip
    return MetaLoss(found if task_weights is None else task_weights.to(found.dtype) * found, logits)


def mean_meta_loss_mlp(support_x, support_y, query_x, query_y, weights, biases, *, lr, steps, loss, activation,
                       first_order, momentum=0.0, weight_decay=0.0, huber_delta=1.0, task_weights=None,
                       masks=(None, None)) -> tuple[MetaLoss, Tensor]:  # fmt: skip
    """`meta_loss_mlp`, its losses without weights, and their weighted mean: what to differentiate, as kernels find its
    gradient too. masks: `support_mask` and `query_mask`."""
    return _meta_loss_mlp_and_mean(support_x, support_y, query_x, query_y, weights, biases, lr, steps, loss, activation,
                                   first_order, task_weights, momentum, weight_decay, huber_delta=huber_delta,
                                   support_mask=masks[0], query_mask=masks[1])  # fmt: skip


def _meta_loss_mlp_and_mean(support_x, support_y, query_x, query_y, weights, biases, lr, steps, loss, activation,
                            first_order, task_weights, momentum=0.0, weight_decay=0.0, norm=None, support_mask=None,
                            query_mask=None, huber_delta=1.0, form="auto", wants_mean=True):  # fmt: skip
    loop = _Loop(support_x, support_y, (query_x, query_y, query_mask), weights, biases, lr, steps, loss, activation,
                 momentum, weight_decay, norm, support_mask, form, first_order, huber_delta)  # fmt: skip
    args = loop.meta_loss_arguments(loss, activation, huber_delta, momentum, weight_decay, first_order)
    checks.task_weights("task_weights", task_weights, "support_x", support_x)
    checks.same_kind("support_x", support_x, task_weights=task_weights)
    task_weights = _at_least_float32(task_weights)
    mean = None
    if norm:
        check_data(_meta_loss_mlp.SPEC, args)
        loss, logits = _inner_loop.meta_loss(*args, norm=_norm(norm))
    elif wants_mean:
        (loss, logits), mean = _meta_loss_mlp.SPEC.with_mean(*args, weights=task_weights)
    else:
        loss, logits = _meta_loss_mlp.SPEC(*args, weights=task_weights)
    return MetaLoss(loss, logits if logits.dtype == loop.dtype else logits.to(loop.dtype)), mean


def dense_arguments(support_x, support_y, query_x, query_y, weights, biases, *, lr, steps, loss, activation,
                    first_order, momentum, weight_decay, huber_delta) -> tuple | None:  # fmt: skip
    """What `mean_meta_loss_mlp` of the same gives the op; None where the first layer's products are not the op's."""
    loop = _Loop(support_x, support_y, (query_x, query_y, None), weights, biases, lr, steps, loss, activation, momentum,
                 weight_decay, None, None, "auto", first_order, huber_delta)  # fmt: skip
    if loop.lowrank:
        return None
    return loop.meta_loss_arguments(loss, activation, huber_delta, momentum, weight_decay, first_order)


class _Loop:
    """The arguments of an inner loop, checked and in the shapes that the ops take."""

    def __init__(self, support_x, support_y, query, weights, biases, lr, steps, loss, activation, momentum,
                 weight_decay, norm, support_mask, form, first_order, huber_delta):  # fmt: skip
        query_x, query_y, query_mask = query or (None, None, None)
        key = checks.key("inner loop", support_x, support_y, *(() if query is None else (query_x, query_y)), weights,
                          biases, steps, loss, activation, momentum, weight_decay, norm, form, first_order,
                          huber_delta)  # fmt: skip
        known = checks.passed(key)
        if not known:
            weights, biases = _layers("weights", weights, 2), _layers("biases", () if biases is None else biases, 1)
            checks.tensor("support_x", support_x, "[T, S, I]")
            values.choice("loss", loss, LOSSES)
            values.choice("activation", activation, ACTIVATIONS)
            values.choice("norm", norm, NORMS)
            values.choice("form", form, FORMS)
            values.count("steps", steps, 0)
            values.number("momentum", momentum, 0)
            values.number("weight_decay", weight_decay, 0)
            values.number("huber_delta", huber_delta, 0, open=True)
            values.flag("first_order", first_order)
        self.steps, self.tasks = steps, support_x.shape[0]
        self.weights, self.biases = list(weights), [] if biases is None else list(biases)
        if not known:
            self._check_layers(support_x)
            self._check_targets("support", support_x, support_y, loss)
            if query is not None:
                checks.tensor("query_x", query_x, "[T, Q, I]")
                checks.same_size("query_x", query_x, 0, "T", "support_x", self.tasks)
                checks.same_size("query_x", query_x, 2, "I", "support_x", support_x.shape[2])
                checks.same_kind("support_x", support_x, query_x=query_x)
                self._check_targets("query", query_x, query_y, loss)
            checks.remember(key)
        _check_detached(support_y=support_y, query_y=query_y)
        self.dtype = support_x.dtype
        autocast = torch.is_autocast_enabled(support_x.device.type)
        if autocast or self.dtype in _HALF:  # sums over many steps: as losses, not below float32
            self.weights, self.biases = ([_at_least_float32(p) for p in group] for group in (self.weights, self.biases))
            support_x, support_y, query_x, query_y = map(_at_least_float32, (support_x, support_y, query_x, query_y))
            self.dtype = support_x.dtype if autocast else self.dtype
        self.support_x, self.support_y, self.query_x, self.query_y = support_x, support_y, query_x, query_y
        # the rows as factors of the steps' gradients, which count as constants in first order
        self.steps_x = support_x.detach() if first_order else support_x
        mean = loss != "maximum_entropy"
        self.support_weight = _row_weight("support_mask", support_mask, support_x, mean)
        self.query_weight = None if query is None else _row_weight("query_mask", query_mask, query_x, mean)
        self.rates, self.element_rates = self._rates(lr)
        if norm == "batch" and support_mask is not None:
            raise ValueError("support_mask cannot be used with norm='batch': padding rows would take part in its means")
        self.lowrank = self._choose_form(form, 0 if query is None else query_x.shape[1], weight_decay, norm)
        first = 1 if self.lowrank else 0
        self.kernel_weights, self.kernel_biases = self.weights[first:], self.biases[first:]

    def _check_layers(self, support_x: Tensor) -> None:
        if not self.weights:
            raise ValueError("weights must hold at least one layer, got none")
        if self.biases and len(self.biases) != len(self.weights):
            raise ValueError(f"biases must hold one per layer = {len(self.weights)}, got {len(self.biases)}")
        width = support_x.shape[2]
        for i, weight in enumerate(_with_tasks(self.weights, 3)):
            checks.same_kind("support_x", support_x, **{f"weights[{i}]": weight})
            checks.choice_of_tasks(f"weights[{i}]", weight, self.tasks)
            checks.same_size(f"weights[{i}]", weight, 2, "I", "its input", width)
            width = weight.shape[1]
            if self.biases:
                (bias,) = _with_tasks(self.biases[i : i + 1], 2)
                checks.same_kind("support_x", support_x, **{f"biases[{i}]": bias})
                checks.choice_of_tasks(f"biases[{i}]", bias, self.tasks)
                checks.same_size(f"biases[{i}]", bias, 1, "O", f"weights[{i}]", width)

    def _check_targets(self, which: str, x: Tensor, y, loss: str) -> None:
        name, rows = f"{which}_y", which[0].upper()
        if loss == "cross_entropy":
            return checks.labels(name, y, f"[T, {rows}]", x, f"{which}_x")
        if loss == "maximum_entropy":
            return self._check_trajectories(name, rows, x, y)
        checks.tensor(name, y, f"[T, {rows}, C]")
        wanted = (*x.shape[:2], self.weights[-1].shape[-2])
        if y.shape != wanted:
            raise ValueError(f"{name} must have shape [T, {rows}, C] = {list(wanted)} for {loss}, got {list(y.shape)}")
        checks.same_kind(f"{which}_x", x, **{name: y})

    def _check_trajectories(self, name: str, rows: str, x: Tensor, y) -> None:
        checks.tensor_of_any_shape(name, y)
        checks.same_kind(f"{name[:-1]}x", x, **{name: y})
        outputs = self.weights[-1].shape[-2]
        if outputs != 1:
            raise ValueError(f"weights must end in one output, a reward, for maximum_entropy, got {outputs}")
        fits = y.dim() in (3, 4) and y.shape[0] == self.tasks and y.shape[-2] >= 1 and y.shape[-1] >= 2
        if fits and y.dim() == 4:
            fits = y.shape[1] == x.shape[1] >= 1
        elif fits:
            fits = x.shape[1] >= 1 and x.shape[1] % (y.shape[1] * y.shape[2]) == 0
        if not fits:
            raise ValueError(
                f"{name} must have shape [T, d, 1 + M] or [T, {rows}, d, 1 + M] for maximum_entropy, d and M at least "
                f"1, with as many rows for each of the d (1 + M) trajectories; got {list(y.shape)} for {x.shape[1]} "
                "rows"
            )

    def _rates(self, lr) -> tuple[Tensor, list[Tensor]]:
        """`[1, K, L]`, and per element one for each weight and bias, or none."""
        layers, like = len(self.weights), self.support_x
        if isinstance(lr, (int, float)) and not isinstance(lr, bool):
            return filled(like, (1, self.steps, layers), values.number("lr", lr, 0)), []
        if isinstance(lr, Tensor):
            checks.tensor_of_any_shape("lr", lr)
            return self._rate_table(lr.to(like)), []
        if not isinstance(lr, (list, tuple)) or len(lr) != 2:
            raise TypeError(
                f"lr must be a float, a tensor, or a pair (weight_rates, bias_rates), got {type(lr).__name__}"
            )
        groups = (("weights", lr[0], self.weights, 2), ("biases", lr[1] or (), self.biases, 1))
        element_rates = []
        for name, rates, parameters, dims in groups:
            rates = _layers(f"lr for {name}", rates, dims)
            if len(rates) != len(parameters):
                raise ValueError(f"lr for {name} must hold one tensor per layer = {len(parameters)}, got {len(rates)}")
            for i, (rate, parameter) in enumerate(zip(rates, parameters, strict=True)):
                rate = rate if rate.dim() == dims + 1 else rate.unsqueeze(0)
                wanted = parameter.shape[-dims:]
                if rate.shape[1:] != wanted:
                    raise ValueError(
                        f"lr for {name}[{i}] must have its shape {list(wanted)}, got {list(rate.shape[1:])}"
                    )
                checks.choice_of_tasks(f"lr for {name}[{i}]", rate, self.tasks)
                element_rates.append(rate.to(like))
        return filled(like, (1, self.steps, layers), 1.0), element_rates

    def _rate_table(self, lr: Tensor) -> Tensor:
        layers, steps = len(self.weights), self.steps
        if lr.dim() == 1 and 1 < layers == steps == lr.shape[0]:
            raise ValueError(
                f"lr of shape [{layers}] may be a rate per layer or per step, of which there are as many: give [L, 1] "
                "or [1, K]"
            )
        if lr.dim() == 1 and lr.shape[0] in (1, layers):
            lr = lr.unsqueeze(1)
        elif lr.dim() == 1 and lr.shape[0] == steps:
            lr = lr.unsqueeze(0)
        elif lr.dim() == 0:
            lr = lr.reshape(1, 1)
        if lr.dim() != 2 or lr.shape[0] not in (1, layers) or lr.shape[1] not in (1, steps):
            raise ValueError(
                f"lr must have shape [], [L], [K] or [L, K] with L = {layers} layers and K = {steps} steps, "
                f"got {list(lr.shape)}"
            )
        return lr.expand(layers, steps).t().unsqueeze(0)

    def _choose_form(self, form: str, queries: int, weight_decay: float, norm) -> bool:
        """Whether the first layer is held in low-rank form."""
        tasks, rows, width = self.support_x.shape
        reason = None
        if weight_decay:
            reason = "weight_decay changes more than the support rows' part of the weights"
        elif self.element_rates:
            reason = "rates per element are no multiple of the support rows"
        elif norm is not None:
            reason = "with a norm the loop runs in plain PyTorch"
        elif not _is_shared(self.weights[0], 3) or (self.biases and not _is_shared(self.biases[0], 2)):
            reason = "the first layer's weights are per task already"
        elif tasks == 0 or rows == 0:
            reason = "there are no support rows"
        if form == "lowrank" and reason is not None:
            raise ValueError(f"form 'lowrank' cannot serve this call: {reason}")
        if form == "auto" and reason is None:
            cost = first_layer_cost(rows, queries, width, self.weights[0].shape[-2], self.steps)
            return self.steps > 0 and cost.lowrank < cost.onchip
        return form == "lowrank"

    def meta_loss_arguments(self, *shared) -> tuple:
        """What the op takes; `shared` are its last arguments, from the loss's name on."""
        x, gram = self.first_layer(self.support_x)
        qx, query_gram = self.first_layer(self.query_x)
        return (x, self.support_y, self.support_weight, qx, self.query_y, self.query_weight, gram, query_gram,
                self.kernel_weights, self.kernel_biases, self.rates, self.element_rates, *shared)  # fmt: skip

    def first_layer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` and no Gram matrix, or in low-rank form the first layer's product and the Gram matrix."""
        if not self.lowrank:
            return x, filled(x, (1, 0, 0), 0.0)
        bias = self.biases[0].flatten() if self.biases else None
        with torch.autocast(x.device.type, enabled=False):  # the inputs have been cast
            gram = torch.bmm(x, self.steps_x.mT)
            return F.linear(x, self.weights[0].flatten(0, -2), bias), gram if bias is None else gram + 1


def _with_tasks(layers: list[Tensor], dims: int) -> list[Tensor]:
    """With a task dimension of 1 where they have none."""
    return [t if t.dim() == dims else t.unsqueeze(0) for t in layers]


def _is_shared(layer: Tensor, dims: int) -> bool:
    return layer.dim() < dims or layer.shape[0] == 1


def _layers(name: str, value, dims: int) -> list[Tensor]:
    layers = checks.sequence(name, value)
    for i, layer in enumerate(layers):
        checks.tensor_of_any_shape(f"{name}[{i}]", layer)
        if layer.dim() not in (dims, dims + 1):
            shape = "[O, I]" if dims == 2 else "[O]"
            raise ValueError(f"{name}[{i}] must have shape [T, {shape[1:-1]}] or {shape}, got {list(layer.shape)}")
    return layers


def _check_detached(**targets: Tensor | None) -> None:
    for name, target in targets.items():
        if target is not None and target.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, which targets do not get here: give {name}.detach()")


def _row_weight(name: str, mask: Tensor | None, x: Tensor, mean: bool) -> Tensor:
    """What each row counts for in its task's mean, or in its sums, `[T, B]`."""
    if mask is None:
        return filled(x, x.shape[:2], 1.0 / max(x.shape[1], 1) if mean else 1.0)
    checks.mask(name, mask, x, name.replace("mask", "x"))
    counted = mask.to(x.dtype)
    return counted / counted.sum(1, keepdim=True).clamp_min(1) if mean else counted


def _at_least_float32(t: Tensor | None) -> Tensor | None:
    return t.float() if t is not None and t.dtype in _HALF else t


def _norm(name: str | None):
    # not a function within: fast weights that hold it are to be pickled
    return None if name is None else partial(_normed, dim=-1 if name == "layer" else 1)


def _normed(h: Tensor, dim: int) -> Tensor:
    centred = h - h.mean(dim, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dim, keepdim=True) + _NORM_EPSILON)
