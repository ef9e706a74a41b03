"""`torchopt.transform`: the parts that optimisers are chains of.

All make new tensors, so that steps can be differentiated; `inplace` then only says that weights are to be read without
their history where gradients have none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmeta.compat._absent import not_here
from fastmeta.functional.update_rules import average, root

from .base import EmptyState, GradientTransformation, identity
from .pytree import tree_leaves, tree_map, tree_structure, tree_unflatten


class ScaleByAdamState(NamedTuple):
    """Averages of the gradient and its square, and steps taken, of each parameter."""

    mu: Any
    nu: Any
    count: Any


class ScaleByRmsState(NamedTuple):
    """The average of the squared gradient of each parameter."""

    nu: Any


class ScaleByRStdDevState(NamedTuple):
    """Averages of the gradient and its square of each parameter."""

    mu: Any
    nu: Any


class ScaleByRssState(NamedTuple):
    """The sum of the squared gradients of each parameter."""

    sum_of_squares: Any


class ScaleByAdadeltaState(NamedTuple):
    """Averages of the squares of gradient and update of each parameter."""

    mu: Any
    nu: Any


class ScaleByAdamaxState(NamedTuple):
    """Average gradient and decayed maximum of each parameter, and the number of the next step."""

    mu: Any
    nu: Any
    t: int


class ScaleByRAdamState(NamedTuple):
    """Averages of the gradient and its square of each parameter, and the number of the next step."""

    mu: Any
    nu: Any
    t: int


class ScaleByScheduleState(NamedTuple):
    """Steps taken, of each parameter."""

    count: Any


class TraceState(NamedTuple):
    """The momentum of each parameter."""

    trace: Any


def stateless(of_leaf: Callable[..., Tensor], with_params: bool = False) -> GradientTransformation:
    """What makes of each gradient, and its parameter where asked for, another one. None stays None."""

    def update_fn(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        if not with_params:
            return tree_map(of_leaf, updates), state
        assert params is not None, "Parameters are required for weight decay: update(updates, state, params=params)"
        here = tree_map(lambda g, p: p.detach() if inplace and not g.requires_grad else p, updates, params)
        return tree_map(of_leaf, updates, here), state

    return GradientTransformation(lambda params: EmptyState(), update_fn)


def _zeros(params: Any, value: float = 0.0, requires_grad: bool = False) -> Any:
    return tree_map(lambda p: torch.full_like(p, value, requires_grad=requires_grad), params)


def _counts(params: Any) -> Any:
    zero = functools.cache(lambda device: torch.zeros((), dtype=torch.int64, device=device))
    return tree_map(lambda p: zero(p.device), params)


def _counted(updates: Any, count: Any) -> Any:
    # parameters that have taken the same steps share one count, and what is made of it
    add = functools.cache(lambda c: c + 1)
    return _over(lambda g, c: add(c), updates, count)


def _over(of_leaf: Callable[..., Any], updates: Any, old: Any) -> Any:
    """`of_leaf(gradient, old)` where there is a gradient, else `old`."""
    return tree_map(lambda g, o: o if g is None else of_leaf(g, o), updates, old, none_is_leaf=True)


def _moved(updates: Any, moments: Any, decay: float, order: int) -> Any:
    """Averages of the gradient or its square, one step on; sums where `decay` is 1."""

    def of_leaf(g: Tensor, old: Tensor) -> Tensor:
        new = g * g if order == 2 else g
        return old + new if decay == 1.0 else average(old, new, decay)

    return _over(of_leaf, updates, moments)


def add_decayed_weights(
    weight_decay: float = 0.0, mask: Any | Callable[[Any], Any] | None = None
) -> GradientTransformation:
    """`g + weight_decay * p`; only where `mask`, a tree of bools or what makes one of the parameters, is True."""
    if not weight_decay >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")
    if mask is None:
        plain = not isinstance(weight_decay, Tensor) and weight_decay == 0.0
        return identity() if plain else stateless(lambda g, p: g + weight_decay * p, with_params=True)
    everywhere = stateless(lambda g, p: g + weight_decay * p, with_params=True)

    def update_fn(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        structure = tree_structure(updates, none_is_leaf=True)
        chosen = tree_unflatten(structure, tree_leaves(mask(updates) if callable(mask) else mask))
        decayed, state = everywhere.update(updates, state, params=params, inplace=inplace)
        return tree_map(lambda g, new, m: new if m else g, updates, decayed, chosen), state

    return GradientTransformation(everywhere.init, update_fn)


class MaskedState(NamedTuple):
    """The state of what is masked."""

    inner_state: Any


class MaskedNode(NamedTuple):
    """In place of a leaf that is left out: a tree without leaves."""


def masked(
    inner: GradientTransformation, mask: Any | Callable[[Any], Any] | None = None
) -> GradientTransformation:
    """`inner` where `mask`, a tree of bools or what makes one of the parameters, is True; the rest stays as it is."""

    def chosen(tree: Any, among: Any) -> Any:
        where = mask(among) if callable(mask) else mask
        return tree_map(lambda leaf, m: leaf if m else MaskedNode(), tree, where)

    def init_fn(params: Any) -> MaskedState:
        return MaskedState(inner.init(chosen(params, params)))

    def update_fn(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        given = None if params is None else chosen(params, updates)
        new, inner_state = inner.update(chosen(updates, updates), state.inner_state, params=given, inplace=inplace)
        merged = tree_map(lambda g, n: g if isinstance(n, MaskedNode) else n, updates, new)
        return merged, MaskedState(inner_state)

    return GradientTransformation(init_fn, update_fn)


def scale(step_size: float) -> GradientTransformation:
    """`step_size * g`."""
    return stateless(lambda g: g * step_size)


def scale_by_schedule(step_size_fn: Callable[[Any], Any]) -> GradientTransformation:
    """`step_size_fn(steps taken) * g`."""

    def update_fn(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        new = tree_map(lambda g, c: g * step_size_fn(c), updates, state.count)
        return new, ScaleByScheduleState(_counted(updates, state.count))

    return GradientTransformation(lambda params: ScaleByScheduleState(_counts(params)), update_fn)


def scale_by_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, eps_root: float = 0.0, moment_requires_grad: bool = False
) -> GradientTransformation:
    """`(m / c1) / (sqrt(v / c2 + eps_root) + eps)`, with `c = 1 - b ** steps` in torch's default dtype."""
    check_adam(eps, (b1, b2))

    def init_fn(params: Any) -> ScaleByAdamState:
        mu, nu = (_zeros(params, requires_grad=moment_requires_grad) for _ in range(2))
        return ScaleByAdamState(mu, nu, _counts(params))

    def update_fn(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        count = _counted(updates, state.count)
        mu, nu = _moved(updates, state.mu, b1, 1), _moved(updates, state.nu, b2, 2)

        corrections = functools.cache(lambda c: (1 - b1**c, 1 - b2**c))

        def of_leaf(g: Tensor, m: Tensor, v: Tensor, c: Tensor) -> Tensor:
            c1, c2 = corrections(c)
            inside = v / c2
            return m / c1 / (root(inside + eps_root if eps_root else inside) + eps)

        return tree_map(of_leaf, updates, mu, nu, count), ScaleByAdamState(mu, nu, count)

    return GradientTransformation(init_fn, update_fn)


scale_by_accelerated_adam = scale_by_adam


def check_adam(eps: float, betas: tuple[float, ...], name: str = "beta") -> None:
    if not eps >= 0.0:
        raise ValueError(f"Invalid epsilon value: {eps}")
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid {name} parameter at index {i}: {beta}")


def scale_by_rms(alpha: float = 0.9, eps: float = 1e-8, initial_scale: float = 0.0) -> GradientTransformation:
    """`g / (sqrt(v) + eps)`."""
    check_rms(alpha, eps)

    def update_fn(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        nu = _moved(updates, state.nu, alpha, 2)
        return tree_map(lambda g, v: g / (root(v) + eps), updates, nu), ScaleByRmsState(nu)

    return GradientTransformation(lambda params: ScaleByRmsState(_zeros(params, initial_scale)), update_fn)


def scale_by_stddev(alpha: float = 0.9, eps: float = 1e-8, initial_scale: float = 0.0) -> GradientTransformation:
    """`g / (sqrt(v - m^2) + eps)`."""
    check_rms(alpha, eps)

    def init_fn(params: Any) -> ScaleByRStdDevState:
        return ScaleByRStdDevState(_zeros(params), _zeros(params, initial_scale))

    def update_fn(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        mu, nu = _moved(updates, state.mu, alpha, 1), _moved(updates, state.nu, alpha, 2)
        new = tree_map(lambda g, m, v: g / (root(v - m * m) + eps), updates, mu, nu)
        return new, ScaleByRStdDevState(mu, nu)

    return GradientTransformation(init_fn, update_fn)


def check_rms(alpha: float, eps: float) -> None:
    for name, value in (("alpha", alpha), ("epsilon", eps)):
        if not value >= 0.0:
            raise ValueError(f"Invalid {name} value: {value}")


def scale_by_rss(initial_accumulator_value: float = 0.0, eps: float = 1e-10) -> GradientTransformation:
    """`g / (sqrt(sum of g^2) + eps)`, and 0 where the sum is 0."""

    def update_fn(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        sums = _moved(updates, state.sum_of_squares, 1.0, 2)
        return tree_map(lambda g, s: g / (root(s) + eps), updates, sums), ScaleByRssState(sums)

    return GradientTransformation(lambda params: ScaleByRssState(_zeros(params, initial_accumulator_value)), update_fn)


def scale_by_adadelta(
    rho: float = 0.9, eps: float = 1e-6, moment_requires_grad: bool = False
) -> GradientTransformation:
    """`g * sqrt((u + eps) / (v + eps))` of the averages v of `g^2` and u of the squared updates before."""
    check_adam(eps, (rho,), "rho")

    def update_fn(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        mu = _moved(updates, state.mu, rho, 2)
        new = tree_map(lambda g, v, u: g * root((u + eps) / (v + eps)), updates, mu, state.nu)
        return new, ScaleByAdadeltaState(mu, _moved(new, state.nu, rho, 2))

    return GradientTransformation(
        lambda params: ScaleByAdadeltaState(*(_zeros(params, 0.0, moment_requires_grad) for _ in range(2))), update_fn
    )


def scale_by_adamax(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6, moment_requires_grad: bool = False
) -> GradientTransformation:
    """`(m / c1) / n` with `n = max(b2 n, |g| + eps)`."""
    check_adam(eps, (b1, b2), "b1")

    def update_fn(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        mu = _moved(updates, state.mu, b1, 1)
        nu = _over(lambda g, n: torch.maximum(b2 * n, g.abs() + eps), updates, state.nu)
        new = tree_map(lambda g, m, n: m / n / (1 - b1**state.t), updates, mu, nu)
        return new, ScaleByAdamaxState(mu, nu, state.t + 1)

    return GradientTransformation(
        lambda params: ScaleByAdamaxState(*(_zeros(params, 0.0, moment_requires_grad) for _ in range(2)), 1), update_fn
    )


def scale_by_radam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6, moment_requires_grad: bool = False
) -> GradientTransformation:
    """Rectified Adam (Liu et al. 2020): `m / c1` until the variance of the average square is tractable."""
    check_adam(eps, (b1, b2), "b1")
    longest = 2 / (1 - b2) - 1

    def update_fn(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        mu, nu, t = _moved(updates, state.mu, b1, 1), _moved(updates, state.nu, b2, 2), state.t
        c1, c2 = 1 - b1**t, 1 - b2**t
        length = longest - 2 * t * b2**t / c2
        if length > 5:
            ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            factor = math.sqrt(c2 * ratio) / c1
            new = tree_map(lambda g, m, v: factor * m / (root(v) + eps), updates, mu, nu)
        else:
            new = tree_map(lambda g, m: m / c1, updates, mu)
        return new, ScaleByRAdamState(mu, nu, t + 1)

    return GradientTransformation(
        lambda params: ScaleByRAdamState(*(_zeros(params, 0.0, moment_requires_grad) for _ in range(2)), 1), update_fn
    )


def trace(
    momentum: float = 0.9, dampening: float = 0.0, nesterov: bool = False, moment_requires_grad: bool = False
) -> GradientTransformation:
    """Momentum, as in `torch.optim.SGD`. As in TorchOpt the step that is not dampened is the first of this object, also
    where a state is recovered and starts anew."""
    check_momentum(momentum, dampening, nesterov)
    if not isinstance(momentum, Tensor) and momentum == 0.0:
        return identity()
    first = True

    def update_fn(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        nonlocal first
        damped = 1.0 if first or nesterov else 1.0 - dampening
        kept = 1.0 if first else momentum
        new = _over(lambda g, t: kept * t + damped * g, updates, state.trace)
        first = False
        along = tree_map(lambda g, t: g + momentum * t if nesterov else t.clone(), updates, new)
        return along, TraceState(new)

    return GradientTransformation(
        lambda params: TraceState(_zeros(params, requires_grad=moment_requires_grad)), update_fn
    )


def check_momentum(momentum: float, dampening: float, nesterov: bool) -> None:
    if not momentum >= 0.0:
        raise ValueError(f"Invalid momentum value: {momentum}")
    if nesterov and (momentum <= 0.0 or dampening != 0.0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")


def nan_to_num(nan: float = 0.0, posinf: float | None = None, neginf: float | None = None) -> GradientTransformation:
    """Numbers in place of NaN and infinities; with `inplace`, in the gradients themselves."""

    def update_fn(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        replaced = torch.nan_to_num_ if inplace else torch.nan_to_num
        return tree_map(lambda g: replaced(g, nan=nan, posinf=posinf, neginf=neginf), updates), state

    return GradientTransformation(lambda params: EmptyState(), update_fn)


__getattr__ = not_here(
    __name__,
    "TorchOpt 0.7.3",
    ("inc_count", "update_moment"),
)
