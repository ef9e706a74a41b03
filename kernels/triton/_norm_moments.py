"""Mean and variance of images, of a task's pixels for each channel, or of an image's for each group of channels, in one
pass over them.

Each program follows mean and squares of its part of the pixels, every lane its own (Welford 1962); what lanes and parts
found is then put together (Chan, Golub and LeVeque 1979), in a fixed order. All of it on distances from a group's first
number: an offset that all pixels have would take digits from the means.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta.kernels._common import accumulator, blocks, launch, tile, triton_accumulator, warps
from fastmeta.kernels._layers import ENOUGH_PROGRAMS


@triton.jit
def first_number(x, segment, group, pixels, channels, per_group, mask, ACC: tl.constexpr):
    """Of a group in a segment, 0 where it is not finite."""
    at = segment * pixels * channels + group * per_group
    value = tl.load(x + at, mask=mask, other=0).to(ACC)
    return tl.where(value - value == 0, value, 0.0)


@triton.jit
def moments_kernel(
    x,
    means,
    squares,
    pixels,
    channels,
    per_group,
    parts,
    pixels_per_part,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Of x `[segments, pixels, channels]` the means, and the sums of squared distances from them, of each part:
    `[segments, parts, channels]`."""
    program = tl.program_id(0).to(tl.int64)
    c_blocks = tl.cdiv(channels, BLOCK_C)
    c = (program % c_blocks).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    segment, part = program // c_blocks // parts, (program // c_blocks % parts).to(tl.int32)
    first = first_number(x, segment, c // per_group, pixels, channels, per_group, c < channels, ACC)
    x += segment * pixels * channels
    mean, square = tl.full([BLOCK_P, BLOCK_C], 0, ACC), tl.full([BLOCK_P, BLOCK_C], 0, ACC)
    count = tl.full([BLOCK_P, 1], 0, ACC)
    end = tl.minimum(part * pixels_per_part + pixels_per_part, pixels)
    for start in range(part * pixels_per_part, end, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        mask = (pixel < end)[:, None] & (c < channels)[None, :]
        value = tl.load(x + pixel.to(tl.int64)[:, None] * channels + c[None, :], mask=mask, other=0).to(ACC) - first
        count += (pixel < end)[:, None].to(ACC)
        from_mean = tl.where(mask, value - mean, 0.0)
        mean += from_mean / tl.maximum(count, 1)
        square += from_mean * tl.where(mask, value - mean, 0.0)
    pixels_of_part = tl.sum(count, 0)
    all_mean = tl.sum(count * mean, 0) / pixels_of_part
    from_mean = mean - all_mean[None, :]
    # a lane without pixels has no mean: nothing, not 0, times what may be infinite
    all_square = tl.sum(square + tl.where(count > 0, count * from_mean * from_mean, 0.0), 0)
    at = (segment * parts + part) * channels + c
    tl.store(means + at, all_mean, mask=c < channels)
    tl.store(squares + at, all_square, mask=c < channels)


@triton.jit
def merge_kernel(
    x,
    means,
    squares,
    mean,
    var,
    groups,
    entries,
    per_group,
    pixels,
    pixels_per_part,
    ACC: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Mean and variance `[segments, groups]` of the parts' and channels' `[segments, parts, groups, per_group]`."""
    program = tl.program_id(0).to(tl.int64)
    g_blocks = tl.cdiv(groups, BLOCK_G)
    group = (program % g_blocks).to(tl.int32) * BLOCK_G + tl.arange(0, BLOCK_G)
    segment = program // g_blocks
    count = tl.full([BLOCK_G], 1, ACC) * pixels * per_group
    total = tl.full([BLOCK_E, BLOCK_G], 0, ACC)
    for start in range(0, entries, BLOCK_E):
        at, mask, weight = _entries(start, segment, group, groups, entries, per_group, pixels, pixels_per_part, BLOCK_E)
        total += weight.to(ACC)[:, None] * tl.load(means + at, mask=mask, other=0)
    all_mean = tl.sum(total, 0) / count
    total = tl.full([BLOCK_E, BLOCK_G], 0, ACC)
    for start in range(0, entries, BLOCK_E):
        at, mask, weight = _entries(start, segment, group, groups, entries, per_group, pixels, pixels_per_part, BLOCK_E)
        from_mean = tl.where(mask, tl.load(means + at, mask=mask, other=0) - all_mean[None, :], 0.0)
        total += tl.load(squares + at, mask=mask, other=0) + weight.to(ACC)[:, None] * from_mean * from_mean
    first = first_number(x, segment, group, pixels, groups * per_group, per_group, group < groups, ACC)
    tl.store(mean + segment * groups + group, first + all_mean, mask=group < groups)
    tl.store(var + segment * groups + group, tl.sum(total, 0) / count, mask=group < groups)


@triton.jit
def _entries(start, segment, group, groups, entries, per_group, pixels, pixels_per_part, BLOCK_E: tl.constexpr):
    """Where a group's entries from `start` on are, a part after the other, and how many pixels each has."""
    entry = start + tl.arange(0, BLOCK_E)
    part = entry // per_group
    parts = entries // per_group
    at = (segment * parts + part)[:, None] * groups + group[None, :]
    mask = (entry < entries)[:, None] & (group < groups)[None, :]
    weight = tl.minimum(pixels - part * pixels_per_part, pixels_per_part)
    return at * per_group + (entry % per_group)[:, None], mask, tl.where(entry < entries, weight, 0)


def norm_moments(x: Tensor, norm: str, groups: int) -> tuple[Tensor, Tensor]:
    tasks, rows, height, width, channels = x.shape
    dtype = accumulator(x.dtype)
    if norm == "batch":
        segments, pixels, groups = tasks, rows * height * width, channels
        shape = (tasks, 1, channels)
    else:
        segments, pixels = tasks * rows, height * width
        shape = (tasks, rows, groups)
    if pixels == 0:
        return tuple(x.new_full(shape, torch.nan, dtype=dtype) for _ in range(2))
    per_group = channels // max(groups, 1)
    side_c = tile(channels, 64)
    side_p = tile(pixels, 1024 // side_c)
    programs = segments * blocks(channels, side_c)
    pixels_per_part = max(blocks(pixels, blocks(ENOUGH_PROGRAMS, max(programs, 1))), 4 * side_p)
    parts = max(1, blocks(pixels, pixels_per_part))
    means, squares = (x.new_empty(segments, parts, channels, dtype=dtype) for _ in range(2))
    launch(
        moments_kernel,
        programs * parts,
        x,
        means,
        squares,
        pixels,
        channels,
        per_group,
        parts,
        pixels_per_part,
        ACC=triton_accumulator(x.dtype),
        BLOCK_P=side_p,
        BLOCK_C=side_c,
        num_warps=warps(side_p * side_c),
    )
    mean, var = (x.new_empty(shape, dtype=dtype) for _ in range(2))
    side_g = tile(groups, 64)
    side_e = tile(parts * per_group, 1024 // side_g)
    launch(
        merge_kernel,
        segments * blocks(groups, side_g),
        x,
        means,
        squares,
        mean,
        var,
        groups,
        parts * per_group,
        per_group,
        pixels,
        pixels_per_part,
        ACC=triton_accumulator(x.dtype),
        BLOCK_E=side_e,
        BLOCK_G=side_g,
        num_warps=warps(side_g * side_e),
    )
    return mean, var
