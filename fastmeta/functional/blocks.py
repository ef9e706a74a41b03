"""What stands between two convolutions, norm, activation and pool, for all tasks in one pass over memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta import values
from fastmeta.dispatch.spec import leading_size
from fastmeta.ops import norm_act_pool as _norm_act_pool

from . import checks
from .autocast import cast

NORMS = ("batch", "instance", "group", "layer", "none")
ACTIVATIONS = ("identity", "relu", "leaky_relu", "gelu", "silu")
POOLS = ("none", "max", "average")


def norm_act_pool(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: str = "batch",
    groups: int = 1,
    running: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    activation: str = "relu",
    slope: float = 0.01,
    pool: str = "none",
    return_moments: bool = False,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """A norm with each task's own statistics, an activation and a 2x2 pool, fused.

    `pool(activation((x - mean) / sqrt(var + eps) * weight + bias))`, of which only the result is written; the backward
    is one pass more, and so is that of the backward. Differentiable to any order. Variances are found about the mean,
    not from sums of squares.

    Args:
        x: `[T, B, C, H, W]`, or `[T, B, C, L]` without a pool, floating. In memory best channels last, as
            `task_conv2d` returns it; other strides are copied once.
        weight: `[T, C]`, or `[1, C]` where the tasks share it, same dtype and device; None (default) for ones.
        bias: `[T, C]` or `[1, C]`; None (default) for zeros.
        norm: over what mean and variance are taken. "batch" (default), per channel the rows and pixels of one task;
            "instance", the pixels of each row and channel; "group", of each row and group of channels; "layer", of each
            row, so with `weight` per channel, as `nn.GroupNorm(1, C)`; "none", there is no norm.
        groups: how many groups of channels, for "group" only (default 1); divides C.
        running: mean and variance `[T, C]` or `[1, C]` to normalise with, constants, in place of those of `x`, for
            "batch" and "instance"; in the dtype of `x`, or float32. None (default): those of `x`.
        eps: added to the variance (default 1e-5).
        activation: "relu" (default), "leaky_relu", "gelu" (exact), "silu" or "identity".
        slope: of "leaky_relu" for negative numbers, at least 0 (default 0.01).
        pool: "none" (default), "max" or "average" of 2x2 pixels with stride 2; an odd last row or column is dropped, as
            in torch.
        return_moments: also return what "batch" found, to update running statistics with.

    Returns:
        `[T, B, C, H, W]`, or with a pool `[T, B, C, H // 2, W // 2]`, channels last in memory; with `return_moments`
        a pair of it and `(mean, var)`, each `[T, C]`, without gradient and float32 where `x` is of half precision.
        `var` is divided by the number n of rows and pixels: torch's running variance takes `var * n / (n - 1)`.

    Raises:
        TypeError: a dtype that is not allowed or differs, an option of another type.
        ValueError: shapes or devices that do not fit together, an unknown option, options that exclude each other.
    """
    key = checks.key(
        "norm_act_pool", x, weight, bias, norm, groups, running, eps, activation, slope, pool, return_moments
    )
    known = checks.passed(key)
    if not known:
        _check_options(norm, groups, running, eps, activation, slope, pool, return_moments)
        _check_shapes(x, weight, bias, norm, groups, running, pool)
    x, *affine = cast(_norm_act_pool.SPEC.autocast, x, *(t for t in (weight, bias) if t is not None))
    if not known:
        checks.same_kind("x", x, **dict(zip(_names(weight, bias), affine, strict=True)))
        checks.remember(key)
    weight, bias = [affine.pop(0)] if weight is not None else [], affine
    block = Block.of(x, weight, bias, norm, groups, running, eps)
    y = block(Follow(activation, slope, pool))
    return (y, (block.moments[0].squeeze(1), block.moments[1].squeeze(1))) if return_moments else y


class Follow(NamedTuple):
    """What comes behind a norm in the same pass."""

    activation: str = "identity"
    slope: float = 0.0  # of "leaky_relu"
    pool: str = "none"

    def activated(self, activation: str, slope: float = 0.0) -> Follow | None:
        """With the activation behind all that is there; None where one pass cannot do that."""
        # behind a pool of the largest, what rises with its input may as well stand before it
        rises = activation == "relu" or activation == "leaky_relu" and slope >= 0
        if self.activation != "identity" or self.pool == "average" or self.pool == "max" and not rises:
            return None
        return self._replace(activation=activation, slope=slope)

    def pooled(self, pool: str) -> Follow | None:
        """With the pool behind all that is there; None where there is one."""
        return self._replace(pool=pool) if self.pool == "none" else None


class Block(NamedTuple):
    """A norm whose statistics are known: called with what follows, it runs. Nothing of it is checked."""

    pixels: Tensor  # `[T, B, H, W, C]`
    weight: list[Tensor]
    bias: list[Tensor]
    moments: list[Tensor]
    norm: str
    groups: int
    eps: float
    sequence: bool = False

    @classmethod
    def of(cls, x: Tensor, *args) -> Block:
        """Of `[T, B, C, H, W]` or `[T, B, C, L]`; the other arguments are those of `of_pixels`."""
        sequence = x.dim() == 4
        pixels = (x.unsqueeze(3) if sequence else x).movedim(2, -1).contiguous()  # once, and not in every kernel
        return cls.of_pixels(pixels, *args)._replace(sequence=sequence)

    @classmethod
    def of_pixels(
        cls, pixels: Tensor, weight: list[Tensor], bias: list[Tensor], norm: str, groups: int, running, eps: float
    ) -> Block:
        kind, groups = _of_op(norm, groups, running, pixels.shape[4])
        moments = _moments(pixels, kind, groups, running)
        tasks = leading_size([pixels, *weight, *bias, *moments])
        moments = [_expanded(m, tasks) for m in moments]
        return cls(_expanded(pixels, tasks), weight, bias, moments, kind, groups, float(eps))

    def __call__(self, follow: Follow) -> Tensor:
        y = self.run(follow).movedim(-1, 2)
        return y.squeeze(3) if self.sequence else y

    def run(self, follow: Follow) -> Tensor:
        """`[T, B, H, W, C]`."""
        activation, slope, pool = follow
        activation, slope = ("relu", float(slope)) if activation == "leaky_relu" else (activation, 0.0)
        return _norm_act_pool.SPEC(*self[:-1], activation, slope, pool)


def _of_op(norm: str, groups: int, running, channels: int) -> tuple[str, int]:
    """The op's name for a norm, and its number of groups."""
    if running is not None:
        return "given", 1
    return {
        "batch": ("batch", 1),
        "instance": ("group", channels),
        "group": ("group", groups),
        "layer": ("group", 1),
        "none": ("none", 1),
    }[norm]


def _moments(pixels: Tensor, kind: str, groups: int, running) -> list[Tensor]:
    """Mean and variance `[T, R, G]`."""
    if kind == "none":
        return []
    if kind != "given":
        # detached: the block's gradient has the part that goes through them
        return list(_norm_act_pool.MOMENTS(pixels.detach(), kind, groups))
    wide = torch.promote_types(pixels.dtype, torch.float32)
    return [t.detach().to(wide).unsqueeze(1) for t in running]


def _expanded(tensor: Tensor, tasks: int) -> Tensor:
    return tensor if tensor.shape[0] == tasks else tensor.expand(tasks, *tensor.shape[1:])


def _names(weight, bias) -> list[str]:
    return [name for name, value in (("weight", weight), ("bias", bias)) if value is not None]


def _check_options(norm, groups, running, eps, activation, slope, pool, return_moments) -> None:
    values.choice("norm", norm, NORMS)
    values.choice("activation", activation, ACTIVATIONS)
    values.choice("pool", pool, POOLS)
    values.number("eps", eps, 0.0)
    values.number("slope", slope, 0.0)
    values.flag("return_moments", return_moments)
    values.count("groups", groups)
    if groups != 1 and norm != "group":
        raise ValueError(f"groups are of norm 'group' alone, got groups = {groups} with norm {norm!r}")
    if running is not None:
        if not isinstance(running, (tuple, list)) or len(running) != 2:
            raise TypeError(f"running must be a pair (mean, var) of tensors or None, got {values.shown(running)}")
        if norm not in ("batch", "instance"):
            raise ValueError(f"running statistics are of norm 'batch' or 'instance', got norm {norm!r}")
    if return_moments and (norm != "batch" or running is not None):
        found = "running statistics" if running is not None else f"norm {norm!r}"
        raise ValueError(f"return_moments gives what norm 'batch' finds in x, got {found}")


def _check_shapes(x, weight, bias, norm, groups, running, pool) -> None:
    checks.tensor_of_any_shape("x", x, " of shape [T, B, C, H, W] or [T, B, C, L]")
    if x.dim() not in (4, 5):
        raise ValueError(f"x must have shape [T, B, C, H, W] or [T, B, C, L], got {list(x.shape)}")
    if x.dim() == 4 and pool != "none":
        raise ValueError(f"pool must be none for x of shape [T, B, C, L], got {pool!r}, which is of 2x2 pixels")
    channels = x.shape[2]
    if norm == "group" and channels % groups:
        raise ValueError(f"groups must divide C = {channels}, got {groups}")
    given = dict(weight=weight, bias=bias)
    if running is not None:
        given |= {"running[0]": running[0], "running[1]": running[1]}
    given = {name: value for name, value in given.items() if value is not None or name.startswith("running")}
    for name, value in given.items():
        checks.tensor(name, value, "[T, C]")
        checks.same_size(name, value, 1, "C", "x", channels)
        checks.same_device(name, value, "x", x)
    tasks = leading_size([x, *given.values()])
    for name, value in {"x": x, **given}.items():
        checks.choice_of_tasks(name, value, tasks)
    for name, value in given.items():
        if name.startswith("running") and value.dtype not in (x.dtype, torch.float32):
            raise TypeError(
                f"{name} is {values.dtype_of(value)}, but x is {values.dtype_of(x)}: it must be that, or float32"
            )
