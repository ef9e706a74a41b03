"""Steps of inner optimisers on parameters of any structure, for all tasks at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta import values

from . import checks, update_rules
from .autocast import cast


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
    if nesterov and (any(map(update_rules.absent, momenta)) or not all(map(update_rules.absent, dampenings))):
        raise ValueError("nesterov needs a momentum and no dampening")
    olds = step.tree("buffers", buffers)
    news, moved = [], []
    for i, (p, g) in enumerate(step.pairs):
        g = update_rules.decayed(g, p, decays[i])
        along, buffer = update_rules.velocity(g, olds[i], momenta[i], dampenings[i], nesterov)
        moved.append(step.masked(i, p - rates[i] * along, p))
        news.append(buffer if buffer is None else step.masked(i, buffer, olds[i]))
    return step.as_given(moved), None if all(new is None for new in news) else step.as_given(news)


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
    means = step.tree("state.exp_avg", state.exp_avg)
    squares = step.tree("state.exp_avg_sq", state.exp_avg_sq)
    maxima = step.tree("state.max_exp_avg_sq", state.max_exp_avg_sq)
    moved, new_means, new_squares, new_maxima = [], [], [], []
    for i, (p, g) in enumerate(step.pairs):
        start = p
        if decoupled:
            start = p if update_rules.absent(decays[i]) else p * (1 - rates[i] * decays[i])
        else:
            g = update_rules.decayed(g, p, decays[i])
        zero = torch.zeros_like(g)
        mean = update_rules.average(zero if means[i] is None else means[i], g, betas1[i])
        square = update_rules.average(zero if squares[i] is None else squares[i], g * g, betas2[i])
        below = square
        if amsgrad:
            below = update_rules.largest(maxima[i], square)
            new_maxima.append(step.masked(i, below, maxima[i]))
        corrections = 1 - betas1[i] ** count, 1 - betas2[i] ** count
        moved.append(
            step.masked(i, update_rules.adam(start, mean, below, rates[i], *corrections, epsilons[i]), p)
        )
        new_means.append(step.masked(i, mean, means[i]))
        new_squares.append(step.masked(i, square, squares[i]))
    trees = (new_means, new_squares, new_maxima if amsgrad else None)
    return step.as_given(moved), AdamState(count, *(tree if tree is None else step.as_given(tree) for tree in trees))


class _Step:
    """The arguments that all steps share, checked and flat."""

    def __init__(self, params: Any, grads: Any, mask: Any):
        flat, self.structure = pytree.tree_flatten(params)
        flat_grads, grad_structure = pytree.tree_flatten(grads)
        if grad_structure != self.structure:
            raise ValueError(f"grads must have the structure of params, {self.structure}, got {grad_structure}")
        paths = pytree.tree_flatten_with_path(params)[0]
        self.names = [f"params{pytree.keystr(path)}" for path, _ in paths]
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
            checks.same_kind(self.names[0], tensors[0], **{name: p, "grads" + name.removeprefix("params"): g})
        self.pairs = list(zip(tensors[: len(flat)], tensors[len(flat) :], strict=True))
        self.shapes = [p.shape if p.dim() >= g.dim() else g.shape for p, g in self.pairs]
        self.masks = [True] * len(flat) if mask is None else self._leaves("mask", mask, self._checked_mask)
        self.pairs = [
            (p, torch.where(m, g, 0) if isinstance(m, Tensor) else g)
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

    def tree(self, name: str, value: Any) -> list:
        """What an earlier step remembers per parameter; None where there was none."""
        if value is None:
            return [None] * len(self.pairs)
        leaves, structure = pytree.tree_flatten(value)
        if structure != self.structure:
            raise ValueError(f"{name} must have the structure of params, {self.structure}, got {structure}")
        for leaf, shape, of in zip(leaves, self.shapes, self.names, strict=True):
            checks.tensor_of_any_shape(f"{name} of {of}", leaf)
            if leaf.shape not in (shape, shape[1:]) and leaf.shape[1:] != shape:
                raise ValueError(f"{name} of {of} must have shape {list(shape)}, got {list(leaf.shape)}")
        return leaves

    def masked(self, index: int, new: Tensor, old: Tensor | None) -> Tensor:
        """`new` where the parameter adapts, else `old`, or 0 where there is none."""
        mask = self.masks[index]
        if mask is True:
            return new
        if mask is False:
            return torch.zeros_like(new) if old is None else old.clone()
        return torch.where(mask, new, 0 if old is None else old)

    def as_given(self, leaves: list) -> Any:
        return pytree.tree_unflatten(leaves, self.structure)

    def _leaves(self, name: str, value: Any, checked: Callable[[str, Any], Any]) -> list:
        if not self.pairs:
            return []
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
