"""Sums over a segment's pixels for each channel: of the gradient at z, of its products with what a norm gives and with
what comes down from a second derivative. The gradients of norm, weight and bias are made of them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmeta.kernels._common import accumulator, blocks, launch
from fastmeta.kernels._sums import sum_rows
from fastmeta.kernels.conv.call import split
from fastmeta.kernels.conv.windows import How, Norm, Sizes, channels_of, read, taken_apart, times_slope


@triton.jit
def channel_sums_kernel(
    outer, grad, x, out, norm, sizes, parts, windows_per_part, HAS_OUTER: tl.constexpr, HOW: tl.constexpr
):
    """out `[segments, parts, 2 or 5, channels]`: the sums of g, g n, and with `outer` of v g, v, v n; g is the gradient
    at z, v what `outer` says of x."""
    program = tl.program_id(0).to(tl.int64)
    c_blocks = tl.cdiv(sizes.channels, HOW.BLOCK_C)
    segment, part = program // c_blocks // parts, (program // c_blocks % parts).to(tl.int32)
    channels = channels_of(norm, segment, program % c_blocks, sizes, HOW)
    x += segment * sizes.pixels * sizes.channels
    outer += segment * sizes.pixels * sizes.channels
    grad += segment * sizes.pooled * sizes.channels
    g_sum = tl.full([HOW.BLOCK_P, HOW.BLOCK_C], 0, HOW.ACC)
    gn_sum, vg_sum, v_sum, vn_sum = g_sum, g_sum, g_sum, g_sum
    end = tl.minimum(part * windows_per_part + windows_per_part, sizes.windows)
    for start in range(part * windows_per_part, end, HOW.BLOCK_P):
        window = start + tl.arange(0, HOW.BLOCK_P)  # parts are whole blocks: no window of the next is in this
        seen = read(x, window, channels, sizes, HOW)
        g = times_slope(taken_apart(grad, window, seen, channels, sizes, HOW), seen.z, HOW)
        g_sum += tl.sum(g, 0)
        gn_sum += tl.sum(g * seen.n, 0)
        if HAS_OUTER:
            v = tl.load(outer + seen.at, mask=seen.mask, other=0).to(HOW.ACC)
            vg_sum += tl.sum(v * g, 0)
            v_sum += tl.sum(v, 0)
            vn_sum += tl.sum(v * seen.n, 0)
    COUNT: tl.constexpr = 5 if HAS_OUTER else 2
    out += (segment * parts + part) * COUNT * sizes.channels + channels.c
    tl.store(out, tl.sum(g_sum, 0), mask=channels.inside)
    tl.store(out + sizes.channels, tl.sum(gn_sum, 0), mask=channels.inside)
    if HAS_OUTER:
        tl.store(out + 2 * sizes.channels, tl.sum(vg_sum, 0), mask=channels.inside)
        tl.store(out + 3 * sizes.channels, tl.sum(v_sum, 0), mask=channels.inside)
        tl.store(out + 4 * sizes.channels, tl.sum(vn_sum, 0), mask=channels.inside)


def parts_to_sum(x: Tensor, parts: int, count: int, sizes: Sizes) -> Tensor:
    """Room for what each part finds of `count` sums for each channel."""
    return x.new_empty(x.shape[0] * sizes.segments, parts, count, sizes.channels, dtype=accumulator(x.dtype))


def summed(partial: Tensor, sizes: Sizes) -> Tensor:
    """`[segments of all tasks, parts, K, C]` -> `[T, segments, K, C]`, the parts in their order."""
    segments, _, count, channels = partial.shape
    if partial.shape[1] > 1:
        partial = sum_rows(partial.flatten(2), partial.dtype)
    return partial.view(segments // max(sizes.segments, 1), sizes.segments, count, channels)


def channel_sums(outer: Tensor | None, grad: Tensor, x: Tensor, norm: Norm, sizes: Sizes, how: How) -> Tensor:
    """`[T, segments, 2 or 5, C]`: the sums that `channel_sums_kernel` names."""
    parts, windows_per_part = split(x.shape[0], sizes, how)
    partial = parts_to_sum(x, parts, 2 if outer is None else 5, sizes)
    launch(
        channel_sums_kernel,
        partial.shape[0] * parts * blocks(sizes.channels, how.BLOCK_C),
        x if outer is None else outer,
        grad,
        x,
        partial,
        norm,
        sizes,
        parts,
        windows_per_part,
        HAS_OUTER=outer is not None,
        HOW=how,
        maxnreg=168,  # else the assembler spills a few for more blocks at once
    )
    return summed(partial, sizes)
