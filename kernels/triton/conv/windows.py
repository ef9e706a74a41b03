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
    """Of a segment, but for the last two."""

    windows: Number
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
    """Of a tile of windows and channels the pixels of one of their members."""

    at: Any  # of the first element of the segment
    mask: Any
    n: Any  # normalised
    z: Any  # before the activation
    grad: Any  # at the activation


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
def member(window, number, sizes, HOW: tl.constexpr):
    """The pixel that is the `number`-th of each window, and whether there is one."""
    SIDE: tl.constexpr = 1 if HOW.POOL == 0 else 2
    high, wide = tl.cdiv(sizes.height, SIDE), tl.cdiv(sizes.width, SIDE)
    row = window // (high * wide)
    h, w = window // wide % high * SIDE + number // SIDE, window % wide * SIDE + number % SIDE
    inside = (window < sizes.windows) & (h < sizes.height) & (w < sizes.width)
    return (row * sizes.height + h) * sizes.width + w, inside


@triton.jit
def pooled(window, sizes, HOW: tl.constexpr):
    """The pixel that comes out of each window, and whether one does: of those that the edge cuts off none."""
    SIDE: tl.constexpr = 1 if HOW.POOL == 0 else 2
    high, wide = tl.cdiv(sizes.height, SIDE), tl.cdiv(sizes.width, SIDE)
    row, h, w = window // (high * wide), window // wide % high, window % wide
    inside = (window < sizes.windows) & (h < sizes.height // SIDE) & (w < sizes.width // SIDE)
    return (row * (sizes.height // SIDE) + h) * (sizes.width // SIDE) + w, inside


@triton.jit
def activated(z, HOW: tl.constexpr):
    if HOW.SLOPE != 0:
        return tl.where(z > 0, z, z * HOW.SLOPE)
    else:
        return activate(z, HOW.ACTIVATION)


@triton.jit
def slope_at(z, HOW: tl.constexpr):
    """Derivative of `activated`."""
    if HOW.SLOPE != 0:
        return tl.where(z > 0, tl.full(z.shape, 1, z.dtype), tl.full(z.shape, HOW.SLOPE, z.dtype))
    else:
        return activation_slope(z, HOW.ACTIVATION)


@triton.jit
def read(x, window, number, channels, sizes, HOW: tl.constexpr):
    """The `number`-th members of windows, and what the norm makes of them; the gradient is not known yet."""
    pixel, inside = member(window, number, sizes, HOW)
    at = pixel.to(tl.int64)[:, None] * sizes.channels + channels.c[None, :]
    mask = inside[:, None] & channels.inside[None, :]
    n = (tl.load(x + at, mask=mask, other=0).to(HOW.ACC) - channels.mean[None, :]) * channels.rate[None, :]
    return Seen(at, mask, n, n * channels.weight[None, :] + channels.bias[None, :], n)


@triton.jit
def largest(x, window, channels, sizes, HOW: tl.constexpr):
    """The value of the largest member of each window after the activation, and which it is: the first, and before all
    others a NaN, as in torch."""
    value = activated(read(x, window, 0, channels, sizes, HOW).z, HOW)
    winner = tl.zeros([HOW.BLOCK_P, HOW.BLOCK_C], tl.int32)
    for number in tl.static_range(1, 4):
        other = activated(read(x, window, number, channels, sizes, HOW).z, HOW)
        takes = (other > value) | (other != other)
        value, winner = tl.where(takes, other, value), tl.where(takes, number, winner)
    return value, winner


@triton.jit
def gradients(grad, x, window, channels, sizes, HOW: tl.constexpr):
    """The gradient of what comes out of each window, and which of its members has it if one alone does."""
    pixel, inside = pooled(window, sizes, HOW)
    at = pixel.to(tl.int64)[:, None] * sizes.channels + channels.c[None, :]
    given = tl.load(grad + at, mask=inside[:, None] & channels.inside[None, :], other=0).to(HOW.ACC)
    if HOW.POOL == 1:
        return given, largest(x, window, channels, sizes, HOW)[1]
    else:
        return given, tl.zeros([HOW.BLOCK_P, HOW.BLOCK_C], tl.int32)


@triton.jit
def of_member(value, winner, number, HOW: tl.constexpr):
    """What the `number`-th member has of a window's value, and the other way round."""
    if HOW.POOL == 1:
        return tl.where(winner == number, value, 0.0)
    elif HOW.POOL == 2:
        return value * 0.25
    else:
        return value
