"""Pixels as a 2x2 pool sees them, and what a norm and an activation make of them.

A *segment* are the images that have their moments together: all of a task, or one. Kernels go through its windows: the
2x2 ones that a pool takes, also those that the edge cuts off, or where there is no pool a window for each pixel. Both
windows and pixels are counted within a segment, in 32 bits, which `why_not` sees to.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastmeta.kernels._common import activate, activation_slope

Pointer = Any  # a tensor on the host, in a kernel a pointer to its first element
Number = Any  # an int on the host, in a kernel a number that it was launched with
NONE, GIVEN, OWN = range(3)  # norms: none; by moments that are constants; by those of the segment itself
NO_POOL, MAX, AVERAGE = range(3)


class How(NamedTuple):
    """What kernels are compiled for."""

    NORM: int
    EPS: float
    ACTIVATION: int  # as in `_common.ACTIVATIONS`
    SLOPE: float  # of a leaky relu, else 0
    POOL: int
    ACC: Any
    BLOCK_P: int  # windows
    BLOCK_C: int  # channels


class Sizes(NamedTuple):
    """Of a segment, but for the last."""

    windows: Number
    windows_high: Number  # of an image
    windows_wide: Number
    height: Number
    width: Number
    pixels: Number
    pooled: Number  # pixels that come out
    channels: Number
    per_group: Number  # channels that share moments
    segments: Number  # of a task


class Norm(NamedTuple):
    """Pointers, and strides from task to task, 0 if they share it."""

    mean: Pointer
    var: Pointer
    weight: Pointer
    bias: Pointer
    moments_stride: Number
    weight_stride: Number
    bias_stride: Number


class Channels(NamedTuple):
    """Of a block of channels: their numbers, and what the norm makes of them: (x - mean) * rate * weight + bias."""

    c: Any
    inside: Any
    mean: Any
    rate: Any
    weight: Any
    bias: Any


class Seen(NamedTuple):
    """Of a tile `[members of a window, windows, channels]`."""

    at: Any  # from the first element of the segment on
    mask: Any
    n: Any  # normalised
    z: Any  # before the activation
    chosen: Any  # whether it is the member that a largest value comes from


@triton.jit
def of_tasks(pointer, stride, segment, sizes, c, ACC: tl.constexpr):
    """A task's numbers for the channels `c`."""
    at = segment // sizes.segments * stride + c
    return tl.load(pointer + at, mask=c < sizes.channels, other=0).to(ACC)


@triton.jit
def channels_of(norm, segment, block, sizes, HOW: tl.constexpr):
    """The channels of `block`, for a segment."""
    c = block.to(tl.int32) * HOW.BLOCK_C + tl.arange(0, HOW.BLOCK_C)
    inside = c < sizes.channels
    weight = of_tasks(norm.weight, norm.weight_stride, segment, sizes, c, HOW.ACC)
    bias = of_tasks(norm.bias, norm.bias_stride, segment, sizes, c, HOW.ACC)
    mean, rate = tl.full([HOW.BLOCK_C], 0, HOW.ACC), tl.full([HOW.BLOCK_C], 1, HOW.ACC)
    if HOW.NORM != 0:
        group = segment % sizes.segments * (sizes.channels // sizes.per_group) + c // sizes.per_group
        at = segment // sizes.segments * norm.moments_stride + group
        mean = tl.load(norm.mean + at, mask=inside, other=0)
        rate = 1 / tl.sqrt(tl.load(norm.var + at, mask=inside, other=1) + HOW.EPS)
    return Channels(c, inside, mean, rate, weight, bias)


@triton.jit
def group_mean(means, row, channels, sizes, HOW: tl.constexpr):
    """A row of means `[rows, G]` for each of the channels; there are some where the moments are the segment's own."""
    if HOW.NORM == 2:
        at = row * (sizes.channels // sizes.per_group) + channels.c // sizes.per_group
        return tl.load(means + at, mask=channels.inside, other=0)
    else:
        return tl.full([HOW.BLOCK_C], 0, HOW.ACC)


@triton.jit
def tile_of(sizes, HOW: tl.constexpr):
    """Segment, windows and block of channels of a program that has one tile."""
    program = tl.program_id(0).to(tl.int64)
    c_blocks, w_blocks = tl.cdiv(sizes.channels, HOW.BLOCK_C), tl.cdiv(sizes.windows, HOW.BLOCK_P)
    window = (program // c_blocks % w_blocks).to(tl.int32) * HOW.BLOCK_P + tl.arange(0, HOW.BLOCK_P)
    return program // c_blocks // w_blocks, window, program % c_blocks


@triton.jit
def pooled(window, channels, sizes, HOW: tl.constexpr):
    """Where the pixel that comes out of each window is, and whether one does: of those that the edge cuts off none."""
    SIDE: tl.constexpr = 1 if HOW.POOL == 0 else 2
    row, h = window // (sizes.windows_high * sizes.windows_wide), window // sizes.windows_wide % sizes.windows_high
    w, high, wide = window % sizes.windows_wide, sizes.height // SIDE, sizes.width // SIDE
    inside = (window < sizes.windows) & (h < high) & (w < wide)
    pixel = (row * high + h) * wide + w
    return (
        pixel.to(tl.int64)[:, None] * sizes.channels + channels.c[None, :],
        inside[:, None] & channels.inside[None, :],
    )


@triton.jit
def activated(z, HOW: tl.constexpr):
    if HOW.SLOPE != 0:
        return tl.where(z > 0, z, z * HOW.SLOPE)
    else:
        return activate(z, HOW.ACTIVATION)


@triton.jit
def times_slope(value, z, HOW: tl.constexpr):
    """`value` times the derivative of `activated`; where that of a relu is 0, 0 also of a NaN, as in torch."""
    if HOW.SLOPE != 0:
        return tl.where(z > 0, value, value * HOW.SLOPE)
    elif HOW.ACTIVATION == 1:
        return tl.where(z <= 0, 0.0, value)
    else:
        return value * activation_slope(z, HOW.ACTIVATION)


@triton.jit
def largest(value):
    """Which member of each window is its largest: the last NaN, else the first of those that are; as in torch."""
    member = tl.arange(0, 4)[:, None, None]
    is_nan = value != value
    top = tl.max(tl.where(is_nan, float("-inf"), value), 0)
    place = tl.where(is_nan, -member, tl.where(value == top[None, :, :], member + 1, 5))
    return place == tl.min(place, 0)[None, :, :]


@triton.jit
def read(x, window, channels, sizes, HOW: tl.constexpr):
    """The members of windows, and what the norm makes of them."""
    SIDE: tl.constexpr = 1 if HOW.POOL == 0 else 2
    member = tl.arange(0, SIDE * SIDE)[:, None]
    row, h = window // (sizes.windows_high * sizes.windows_wide), window // sizes.windows_wide % sizes.windows_high
    y = (h * SIDE)[None, :] + member // SIDE
    x_at = (window % sizes.windows_wide * SIDE)[None, :] + member % SIDE
    pixel = ((row * sizes.height)[None, :] + y) * sizes.width + x_at
    inside = (window < sizes.windows)[None, :] & (y < sizes.height) & (x_at < sizes.width)
    at = pixel.to(tl.int64)[:, :, None] * sizes.channels + channels.c[None, None, :]
    mask = inside[:, :, None] & channels.inside[None, None, :]
    value = tl.load(x + at, mask=mask, other=0).to(HOW.ACC)
    n = (value - channels.mean[None, None, :]) * channels.rate[None, None, :]
    z = n * channels.weight[None, None, :] + channels.bias[None, None, :]
    return Seen(at, mask, n, z, largest(activated(z, HOW)) if HOW.POOL == 1 else mask)


@triton.jit
def put_together(value, seen, HOW: tl.constexpr):
    """What the members' values make for the pixel that comes out; also how its gradient is made of theirs."""
    if HOW.POOL == 1:
        return tl.sum(tl.where(seen.chosen, value, 0.0), 0)
    elif HOW.POOL == 2:
        return tl.sum(value, 0) * 0.25
    else:
        return tl.sum(value, 0)


@triton.jit
def taken_apart(grad, window, seen, channels, sizes, HOW: tl.constexpr):
    """The members' gradients of that of the pixel that comes out; one for all where all have the same."""
    at, mask = pooled(window, channels, sizes, HOW)
    given = tl.load(grad + at, mask=mask, other=0).to(HOW.ACC)[None, :, :]
    if HOW.POOL == 1:
        return tl.where(seen.chosen, given, 0.0)
    elif HOW.POOL == 2:
        return given * 0.25
    else:
        return given
