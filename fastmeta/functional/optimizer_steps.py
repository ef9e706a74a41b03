"""Steps of inner optimisers on parameters of any structure, for all tasks at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta import values
from fastmeta.ops import optimizer_steps as _ops

from . import checks
from .autocast import cast
from .second_order import refuse_compiled
from .update_rules import Number, absent


class AdamState(NamedTuple):
    """What Adam remembers: how many steps were taken, and trees in the structure of the parameters."""

    step: int
    exp_avg: Any
    exp_avg_sq: Any
    max_exp_avg_sq: Any = None


def sgd_step(
    params: Any,
    grads: Any,
    buffers: Any = None,
    *,
    lr: Any,
    momentum: Any = 0.0,
    dampening: Any = 0.0,
    nesterov: bool = False,
    weight_decay: Any = 0.0,
    mask: Any = None,
) -> tuple[Any, Any]:
    """One step of stochastic gradient descent with momentum, differentiable with respect to all that it is given.

    As `torch.optim.SGD`: `g = grads + weight_decay * params`; the buffer is `g` in the first step, then
    `momentum * buffer + (1 - dampening) * g`; the step goes along the buffer, or with Nesterov's momentum along
    `g + momentum * buffer`.

    Args:
        params: a tensor or any pytree of them; each per task `[T, *shape]`, or `[*shape]` where the tasks share it.
        grads: the same structure; each `[T, *shape]` or `[*shape]`.
        buffers: what the previous step has returned, None before the first.
        lr, momentum, dampening, weight_decay: each a float or a tensor with one element; `[T]`, one per task; or the
            structure of `params` with, for each parameter, a float, a tensor with one element (per tensor), `[*shape]`
            (per element), `[T]` or `[T, *shape]`. Zero as a float leaves its term out; a tensor may be learned, and has
            a gradient at zero too. Default 0 but for `lr`.
        nesterov: needs a momentum, and no dampening.
        mask: what adapts: the structure of `params` with bools or bool tensors `[*shape]`, `[T]` or `[T, *shape]`, or
            one tensor `[T]`. Elsewhere parameters stay what they are, and gradients are not read. Default: all.

    Returns:
        The parameters after the step and the momentum buffers (None without momentum), in the structure of `params`;
        each tensor `[T, *shape]`, or `[*shape]` where nothing it depends on has a task dimension.

    Raises:
        TypeError: a dtype or kind that is not allowed or differs.
        ValueError: structures, shapes, devices or numbers that do not fit.
    """
    step = _Step(params, grads, mask)
    values.flag("nesterov", nesterov)
    rates = step.hyper("lr", lr)
    momenta = step.hyper("momentum", momentum, 0.0)
    dampenings = step.hyper("dampening", dampening)
    decays = step.hyper("weight_decay", weight_decay, 0.0)
    if nesterov and (any(map(absent, momenta)) or not all(map(absent, dampenings))):
        raise ValueError("nesterov needs a momentum and no dampening")
    old = step.tree("buffers", buffers)
    if not step.pairs:
        return step.as_given([]), None
    keeps = not all(map(absent, momenta))
    shares = [1.0 if old is None or absent(m) else 1 - d for m, d in zip(momenta, dampenings, strict=True)]
    moved, news = step.call(_ops.SGD, [old], [rates, momenta, shares, decays], nesterov, keeps)
    moved = step.as_given(step.masked(moved, [p for p, _ in step.pairs]))
    if not keeps:
        return moved, buffers
    return moved, step.as_given(step.masked(step.of_gradients(news, decays, old, momenta, shares), old))


def adam_step(
    params: Any,
    grads: Any,
    state: AdamState | None = None,
    *,
    lr: Any = 1e-3,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    decoupled: bool = False,
    amsgrad: bool = False,
    mask: Any = None,
) -> tuple[Any, AdamState]:
    """One step of Adam (Kingma and Ba 2015), differentiable with respect to all that it is given.

    As `torch.optim.Adam`: `m = beta1 m + (1 - beta1) g`, `v = beta2 v + (1 - beta2) g^2` from 0, and the step
    `lr * (m / c1) / (sqrt(v / c2) + eps)` with `c = 1 - beta^step`. Where v is 0, as for a unit that no example of a
    task has reached, autograd through the root gives NaN; here the derivative is the limit, `lr (1 - beta1) / (c1 eps)`
    for that of the step with respect to g.

    Args:
        params: a tensor or any pytree of them; each per task `[T, *shape]`, or `[*shape]` where the tasks share it.
        grads: the same structure; each `[T, *shape]` or `[*shape]`.
        state: what the previous step has returned, None before the first.
        lr, betas (each of the two), eps, weight_decay: a float or a tensor with one element; `[T]`, one per task; or
            the structure of `params` with, for each parameter, a float, a tensor with one element (per tensor),
            `[*shape]` (per element), `[T]` or `[T, *shape]`. Defaults 1e-3, (0.9, 0.999), 1e-8 and 0.
        decoupled: weights decay by `lr * weight_decay` themselves, as in AdamW (Loshchilov and Hutter 2019), instead of
            their decay entering the gradient. Default False.
        amsgrad: divide by the largest v so far (Reddi et al. 2018). Default False.
        mask: what adapts: the structure of `params` with bools or bool tensors `[*shape]`, `[T]` or `[T, *shape]`, or
            one tensor `[T]`. Elsewhere parameters and moments stay what they are, and gradients are not read. Default:
            all.

    Returns:
        The parameters after the step, in the structure of `params`, and the state; each tensor `[T, *shape]`, or
        `[*shape]` where nothing it depends on has a task dimension.

    Raises:
        TypeError: a dtype or kind that is not allowed or differs.
        ValueError: structures, shapes, devices or numbers that do not fit.
    """
    step = _Step(params, grads, mask)
    values.flag("decoupled", decoupled)
    values.flag("amsgrad", amsgrad)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be a pair, got {values.shown(betas)}")
    rates = step.hyper("lr", lr)
    betas1 = step.hyper("betas[0]", betas[0], 0.0, below=1.0)
    betas2 = step.hyper("betas[1]", betas[1], 0.0, below=1.0)
    epsilons = step.hyper("eps", eps, 0.0)
    decays = step.hyper("weight_decay", weight_decay, 0.0)
    if state is not None and not isinstance(state, AdamState):
        raise TypeError(f"state must be what adam_step has returned, or None, got {type(state).__name__}")
    state = state or AdamState(0, None, None)
    count = state.step + 1
    old = [
        step.tree("state.exp_avg", state.exp_avg),
        step.tree("state.exp_avg_sq", state.exp_avg_sq),
        step.tree("state.max_exp_avg_sq", state.max_exp_avg_sq) if amsgrad else None,
    ]
    corrections = [(1 - b1**count, _root(1 - b2**count)) for b1, b2 in zip(betas1, betas2, strict=True)]
    if decoupled:
        decays = [w if absent(w) else lr * w for lr, w in zip(rates, decays, strict=True)]
    rates = [lr * root2 / c1 for lr, (c1, root2) in zip(rates, corrections, strict=True)]
    epsilons = [eps * root2 for eps, (_, root2) in zip(epsilons, corrections, strict=True)]
    shares = [[1 - beta for beta in betas] for betas in (betas1, betas2)]
    if not step.pairs:
        return step.as_given([]), AdamState(count, *(step.as_given([]) for _ in range(2 + amsgrad)))
    moved, *news = step.call(_ops.ADAM, old, [rates, *shares, epsilons, decays], decoupled, amsgrad)
    moved = step.masked(moved, [p for p, _ in step.pairs])
    coupled = None if decoupled else decays
    of_squares = (old[1], shares[1])
    others = (old[0], shares[0]), of_squares, (old[2], *of_squares)
    made = [
        step.as_given(step.masked(step.of_gradients(new, coupled, *of), was))
        for new, was, of in zip(news, old, others, strict=True)
        if new
    ]
    return step.as_given(moved), AdamState(count, *made)


def _root(value: Number) -> Number:
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def _layout(first: Tensor, *others: Number) -> tuple[torch.Size, bool]:
    """The shape to which they broadcast, and whether one is repeated for that. Numbers do not count."""
    shapes = [of.shape for of in others if isinstance(of, Tensor) and (of.dim() or not first.dim())]
    if all(shape == first.shape for shape in shapes):
        return first.shape, False
    return torch.broadcast_shapes(first.shape, *shapes), True


def _matrix(value: Tensor, whole: torch.Size, by_task: bool) -> Tensor:
    """As `[T, n]`, or less where it is repeated; or if not `by_task` as `[1, n]`, of one element `[1, 1]`."""
    rows, columns = (whole[0], whole[1:].numel()) if by_task else (1, whole.numel())
    if value.shape == whole:
        return value.reshape(rows, columns)
    if value.dim() == 0:
        return value.reshape(1, 1)
    if value.shape == whole[1:]:
        return value.reshape(1, columns)
    if value.dim() == len(whole) and value.shape[0] == rows == value.numel():
        return value.reshape(rows, 1)
    return value.expand(whole).reshape(rows, columns)


class _Step:
    """The arguments that all steps share, checked and flat."""

    def __init__(self, params: Any, grads: Any, mask: Any):
        refuse_compiled(grads, params)
        flat, self.structure = pytree.tree_flatten(params)
        flat_grads, grad_structure = pytree.tree_flatten(grads)
        if grad_structure != self.structure:
            raise ValueError(f"grads must have the structure of params, {self.structure}, got {grad_structure}")
        self.names = checks.names_of_parameters(params)
        for name, p, g in zip(self.names, flat, flat_grads, strict=True):
            grad_name = "grads" + name.removeprefix("params")
            checks.tensor_of_any_shape(name, p)
            checks.tensor_of_any_shape(grad_name, g)
            if p.shape != g.shape and p.shape != g.shape[1:] and g.shape != p.shape[1:]:
                raise ValueError(
                    f"{grad_name} must have the shape of {name} = {list(p.shape)}, with or without a leading task "
                    f"dimension, got {list(g.shape)}"
                )
        tensors = cast("widest", *flat, *flat_grads) if flat else []
        for name, p, g in zip(self.names, tensors, tensors[len(flat) :], strict=False):
            if len({(t.dtype, t.device) for t in (tensors[0], p, g)}) > 1:
                checks.same_kind(self.names[0], tensors[0], **{name: p, "grads" + name.removeprefix("params"): g})
        self.pairs = list(zip(tensors[: len(flat)], tensors[len(flat) :], strict=True))
        self.shapes = [p.shape if p.dim() >= g.dim() else g.shape for p, g in self.pairs]
        self.masks = [True] * len(flat) if mask is None else self._leaves("mask", mask, self._checked_mask)
        self.pairs = [
            (p, g if m is True else torch.where(m, g, 0) if isinstance(m, Tensor) else torch.zeros_like(g))
            for (p, g), m in zip(self.pairs, self.masks, strict=True)
        ]

    def hyper(self, name: str, value: Any, least: float = float("-inf"), below: float | None = None) -> list:
        """One number, or tensor that broadcasts, per parameter."""

        def checked(name, leaf):
            if not isinstance(leaf, Tensor):
                return values.number(name, leaf, least, below=below)
            checks.tensor_of_any_shape(name, leaf)
            return leaf.to(self.pairs[0][0])

        return self._leaves(name, value, checked)

    def tree(self, name: str, value: Any) -> list[Tensor] | None:
        """What an earlier step remembers per parameter; None where there was none."""
        if value is None:
            return None
        leaves, structure = pytree.tree_flatten(value)
        if structure != self.structure:
            raise ValueError(f"{name} must have the structure of params, {self.structure}, got {structure}")
        for leaf, shape, of in zip(leaves, self.shapes, self.names, strict=True):
            checks.tensor_of_any_shape(f"{name} of {of}", leaf)
            if leaf.shape not in (shape, shape[1:]) and leaf.shape[1:] != shape:
                raise ValueError(f"{name} of {of} must have shape {list(shape)}, got {list(leaf.shape)}")
        return [leaf.to(p) for leaf, (p, _) in zip(leaves, self.pairs, strict=True)]

    def call(self, op, states: list, hyper: list[list[Number]], *flags: bool) -> list[list[Tensor]]:
        """The op's outputs, each in the shape to which all that the op is given for that parameter broadcasts."""
        lists = [*map(list, zip(*self.pairs, strict=True)), *([] if of is None else of for of in states)]
        layouts = [_layout(*of) for of in zip(*(of for of in (*lists, *hyper) if of), strict=True)]
        tasks = next((whole[0] for whole, repeats in layouts if repeats), None)
        by_task = [repeats or tasks is not None and whole[:1] == (tasks,) for whole, repeats in layouts]
        found: list[list] = []
        for which in (True, False):  # nearly always one launch: some tensors may have nothing to do with tasks
            chosen = [i for i, of in enumerate(by_task) if of is which]
            if not chosen:
                continue
            matrices = [[_matrix(of[i], layouts[i][0], which) for i in chosen] if of else [] for of in lists]
            numbers = []
            for values_of in ([of[i] for i in chosen] for of in hyper):
                number = values_of[0]
                same = all(not isinstance(value, Tensor) and value == number for value in values_of)
                numbers.append(float(number) if same else 0.0)
                matrices.append([] if same else [
                    _matrix(v, layouts[i][0], which) if isinstance(v, Tensor) else matrices[0][0].new_full((1, 1), v)
                    for i, v in zip(chosen, values_of, strict=True)
                ])
            outputs = op(*matrices, *numbers, *flags)
            found = found or [[None] * len(layouts) if of else [] for of in outputs]
            for of, made in zip(found, outputs, strict=True):
                for i, out in zip(chosen, made, strict=False):  # an output that is not wanted is empty
                    of[i] = out.reshape(layouts[i][0])
        return found

    def of_gradients(self, news: list[Tensor], decays: list[Number] | None, *others: list | None) -> list[Tensor]:
        """Without a task dimension where neither the gradient nor `others` have one: it came of rates."""
        found = []
        for i, (new, (p, g)) in enumerate(zip(news, self.pairs, strict=True)):
            given = [g, *(of[i] for of in others if of is not None)]
            if decays is not None and not absent(decays[i]):
                given += [p, decays[i]]
            dims = max(t.dim() for t in given if isinstance(t, Tensor))
            while new.dim() > dims:
                new = new[:1].sum(0)  # not [0]: there may be no tasks
            found.append(new)
        return found

    def masked(self, news: list[Tensor], olds: list[Tensor] | None) -> list[Tensor]:
        """`news` where parameters adapt, else `olds`, or 0 where there are none."""
        return [
            new if mask is True else self._masked(mask, new, None if olds is None else olds[i])
            for i, (new, mask) in enumerate(zip(news, self.masks, strict=True))
        ]

    @staticmethod
    def _masked(mask: Any, new: Tensor, old: Tensor | None) -> Tensor:
        if mask is False:
            return torch.zeros_like(new) if old is None else old.clone()
        return torch.where(mask, new, 0 if old is None else old)

    def as_given(self, leaves: list) -> Any:
        return pytree.tree_unflatten(leaves, self.structure)

    def _leaves(self, name: str, value: Any, checked: Callable[[str, Any], Any]) -> list:
        if not self.pairs:
            return []
        if isinstance(value, float):  # as nearly always
            return [checked(name, value)] * len(self.pairs)
        leaves, structure = pytree.tree_flatten(value)
        for_all = structure.is_leaf() and not (self.structure.is_leaf() and isinstance(value, Tensor))
        if for_all:
            value = checked(name, value)
            if isinstance(value, Tensor) and value.dim() > 1 and value.numel() != 1:
                raise ValueError(
                    f"{name} as one tensor must have one element or shape [T], got {list(value.shape)}; per element "
                    "give it the structure of params"
                )
            leaves = [value] * len(self.pairs)
        elif structure != self.structure:
            raise ValueError(f"{name} must be for all parameters, or have their structure, {self.structure}")
        else:
            leaves = [checked(f"{name} of {of}", leaf) for leaf, of in zip(leaves, self.names, strict=True)]
        return [
            self._broadcast(name, of, leaf, shape, for_all)
            for leaf, of, shape in zip(leaves, self.names, self.shapes, strict=True)
        ]

    def _broadcast(self, name: str, of: str, leaf: Any, shape: torch.Size, for_all: bool) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.numel() == 1:
            return leaf.reshape(())
        per_task = len(shape) > 0 and leaf.shape == shape[:1]
        if per_task and leaf.shape == shape[1:] and self.structure.is_leaf():
            raise ValueError(
                f"{name} of shape {list(leaf.shape)} may be per task or per element of params {list(shape)}: give it "
                "shape [T, *shape], or put params in a list"
            )
        if leaf.shape in (shape, shape[1:]) and not (per_task and for_all):
            return leaf
        if per_task:
            return leaf.reshape(-1, *[1] * (len(shape) - 1))
        if leaf.shape[1:] == shape:  # of each task and element, where the tasks share the parameter and its gradient
            return leaf
        raise ValueError(
            f"{name} for {of} must have one element, shape [T], or the parameter's, with or without a leading task "
            f"dimension; got {list(leaf.shape)} for shape {list(shape)}"
        )

    @staticmethod
    def _checked_mask(name: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return values.flag(name, leaf)
        if leaf.dtype != torch.bool:
            raise TypeError(f"{name} must be bool, got {values.dtype_of(leaf)}")
        return leaf
