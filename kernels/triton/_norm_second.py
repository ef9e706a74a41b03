"""The gradient of `norm_act_pool_bwd`, in formulas as in `norm_act_pool.py`.

Let v, u, c be what comes down for d_x, d_weight and d_bias; mean over a segment's pixels and a group's channels; and

    a = mean(v n),    b = mean(h n),    S = mean(v h) - mean v mean h - a b

What d_x, d_weight and d_bias are made of is the gradient g at z; the gradient for it is

    q = weight rate (v - mean v - n a) + u n + c

which leads to `grad` by the slope of the activation, at the pixels that had it, and where the activation bends to z:
e = q (gradient at the activation) act''(z). Then for n, and for x, whose rate is a function of it,

    k = weight e + u g - rate (v b + h a),    d_x = rate (k - mean k - n mean(k n)) - S rate^2 n
    d_weight = rate (sum v g - mean v sum g - a sum g n) + sum e n,    d_bias = sum e

The means of k follow from sums that are known: mean k = mean(weight e + u g) - rate (b mean v + a mean h), mean(k n) =
mean((weight e + u g) n) - 2 rate a b. So where the activation does not bend, one pass sums and one writes. Of given
moments, and without a norm, the means and S are no part of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta.kernels._channel_sums import channel_sums, parts_to_sum, summed
from fastmeta.kernels._common import accumulator, activation_bend, blocks, launch
from fastmeta.kernels._layers import stride
from fastmeta.kernels.conv.call import gradient_of_tasks, group_means, prepared, programs, split
from fastmeta.kernels.conv.windows import (
    NONE,
    OWN,
    How,
    Norm,
    Number,
    Pointer,
    Sizes,
    channels_of,
    group_mean,
    of_tasks,
    pooled,
    put_together,
    read,
    taken_apart,
    tile_of,
    times_slope,
)

BENDING = ("gelu", "silu")


class Outer(NamedTuple):
    """What comes down, as pointers, strides from task to task, and means `[segments, 7, G]` of h, h n, v h, v, v n, u g
    and u g n."""

    x: Pointer
    weight: Pointer
    bias: Pointer
    weight_stride: Number
    bias_stride: Number
    means: Pointer


class Down(NamedTuple):
    """Of a block of channels u and c; mean v and a."""

    weight: Any
    bias: Any
    mean_v: Any
    mean_vn: Any


@triton.jit
def down_to(outer, segment, channels, sizes, HOW: tl.constexpr):
    return Down(
        of_tasks(outer.weight, outer.weight_stride, segment, sizes, channels.c, HOW.ACC),
        of_tasks(outer.bias, outer.bias_stride, segment, sizes, channels.c, HOW.ACC),
        group_mean(outer.means, segment * 7 + 3, channels, sizes, HOW),
        group_mean(outer.means, segment * 7 + 4, channels, sizes, HOW),
    )


@triton.jit
def for_gradient(v, seen, channels, down, HOW: tl.constexpr):
    """q of a tile."""
    if HOW.NORM == 2:
        v -= down.mean_v + seen.n * down.mean_vn
    return channels.weight * channels.rate * v + down.weight * seen.n + down.bias


@triton.jit
def bend_sums_kernel(grad, x, outer, out, norm, sizes, parts, windows_per_part, HOW: tl.constexpr):
    """out `[segments, parts, 2, channels]`: the sums of e and e n."""
    program = tl.program_id(0).to(tl.int64)
    c_blocks = tl.cdiv(sizes.channels, HOW.BLOCK_C)
    segment, part = program // c_blocks // parts, (program // c_blocks % parts).to(tl.int32)
    channels = channels_of(norm, segment, program % c_blocks, sizes, HOW)
    down = down_to(outer, segment, channels, sizes, HOW)
    x += segment * sizes.pixels * sizes.channels
    v_of_segment = outer.x + segment * sizes.pixels * sizes.channels
    grad += segment * sizes.pooled * sizes.channels
    e_sum = tl.full([HOW.BLOCK_P, HOW.BLOCK_C], 0, HOW.ACC)
    en_sum = e_sum
    end = tl.minimum(part * windows_per_part + windows_per_part, sizes.windows)
    for start in range(part * windows_per_part, end, HOW.BLOCK_P):
        window = start + tl.arange(0, HOW.BLOCK_P)  # parts are whole blocks: no window of the next is in this
        seen = read(x, window, channels, sizes, HOW)
        v = tl.load(v_of_segment + seen.at, mask=seen.mask, other=0).to(HOW.ACC)
        q = for_gradient(v, seen, channels, down, HOW)
        e = q * taken_apart(grad, window, seen, channels, sizes, HOW) * activation_bend(seen.z, HOW.ACTIVATION)
        e_sum += tl.sum(e, 0)
        en_sum += tl.sum(e * seen.n, 0)
    out += (segment * parts + part) * 2 * sizes.channels + channels.c
    tl.store(out, tl.sum(e_sum, 0), mask=channels.inside)
    tl.store(out + sizes.channels, tl.sum(en_sum, 0), mask=channels.inside)


@triton.jit
def norm_second_kernel(
    grad,
    x,
    outer,
    bends,
    d_grad,
    d_x,
    norm,
    sizes,
    BENT: tl.constexpr,
    WANTS_GRAD: tl.constexpr,
    WANTS_X: tl.constexpr,
    HOW: tl.constexpr,
):
    """d_grad and d_x; bends `[segments, 2, G]`: the means of weight e and weight e n, where BENT."""
    segment, window, block = tile_of(sizes, HOW)
    channels = channels_of(norm, segment, block, sizes, HOW)
    down = down_to(outer, segment, channels, sizes, HOW)
    mean_h = group_mean(outer.means, segment * 7, channels, sizes, HOW)
    mean_hn = group_mean(outer.means, segment * 7 + 1, channels, sizes, HOW)
    mean_vh = group_mean(outer.means, segment * 7 + 2, channels, sizes, HOW)
    mean_k = group_mean(outer.means, segment * 7 + 5, channels, sizes, HOW)
    mean_kn = group_mean(outer.means, segment * 7 + 6, channels, sizes, HOW)
    if BENT:
        mean_k += group_mean(bends, segment * 2, channels, sizes, HOW)
        mean_kn += group_mean(bends, segment * 2 + 1, channels, sizes, HOW)
    mean_k -= channels.rate * (mean_hn * down.mean_v + down.mean_vn * mean_h)
    mean_kn -= 2 * channels.rate * down.mean_vn * mean_hn
    spread = mean_vh - down.mean_v * mean_h - down.mean_vn * mean_hn
    first = segment * sizes.pixels * sizes.channels
    seen = read(x + first, window, channels, sizes, HOW)
    v = tl.load(outer.x + first + seen.at, mask=seen.mask, other=0).to(HOW.ACC)
    q = for_gradient(v, seen, channels, down, HOW)
    if WANTS_GRAD:
        value = put_together(times_slope(q, seen.z, HOW), seen, HOW)
        at, mask = pooled(window, channels, sizes, HOW)
        d_grad += segment * sizes.pooled * sizes.channels
        tl.store(d_grad + at, value.to(d_grad.dtype.element_ty), mask=mask)
    if WANTS_X:
        grad += segment * sizes.pooled * sizes.channels
        own = taken_apart(grad, window, seen, channels, sizes, HOW)
        g = times_slope(own, seen.z, HOW)
        k = down.weight * g
        if BENT:
            k += channels.weight * q * own * activation_bend(seen.z, HOW.ACTIVATION)
        if HOW.NORM == 2:
            k -= channels.rate * (v * mean_hn + channels.weight * g * down.mean_vn)
            k -= mean_k + seen.n * mean_kn + channels.rate * spread * seen.n
        tl.store(d_x + first + seen.at, (k * channels.rate).to(d_x.dtype.element_ty), mask=seen.mask)


def norm_act_pool_bwd_bwd(
    v, u, c, grad, x, weight, bias, moments, *options_and_needs
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """v: what comes down for d_x, u and c for d_weight and d_bias; of no size where that gradient was not wanted."""
    *options, needs, wanted = options_and_needs
    norm, sizes, how = prepared(x, weight, bias, moments, *options)
    tasks, bent = x.shape[0], options[3] in BENDING
    zeros = x.new_zeros(1, x.shape[4], dtype=accumulator(x.dtype))
    v = v if needs & 1 else torch.zeros_like(x)
    u, c = u[0] if u and needs & 2 else zeros, c[0] if c and needs & 4 else zeros
    totals = bends = means = None
    if how.NORM == OWN or wanted & 4 and weight:
        totals = channel_sums(v, grad, x, norm, sizes, how)
    if how.NORM == OWN:
        parts = (totals[:, :, :3], norm.weight), (totals[:, :, 3:], None), (totals[:, :, :2], u)
        means = torch.cat([group_means(sums, by, sizes) for sums, by in parts], 2)
    outer = Outer(v, u, c, stride(u, tasks), stride(c, tasks), x if means is None else means)
    if bent and (how.NORM == OWN or wanted & 12):
        bends = _bend_sums(grad, x, outer, norm, sizes, how)
    d_grad = torch.empty_like(grad) if wanted & 1 else grad.new_empty(0)
    d_x = torch.empty_like(x) if wanted & 2 else x.new_empty(0)
    if wanted & 3:
        launch(
            norm_second_kernel,
            programs(tasks, sizes, how),
            grad,
            x,
            outer,
            group_means(bends, norm.weight, sizes) if bent and how.NORM == OWN else x,
            d_grad,
            d_x,
            norm,
            sizes,
            BENT=bent,
            WANTS_GRAD=bool(wanted & 1),
            WANTS_X=bool(wanted & 2),
            HOW=how,
        )
    d_weight, d_bias = [w.new_empty(0) for w in weight], [b.new_empty(0) for b in bias]
    if wanted & 4 and weight:
        d_weight = [gradient_of_tasks(_weight_totals(totals, bends, means, norm, sizes, how), weight[0])]
    if wanted & 8 and bias:
        d_bias = [gradient_of_tasks(bends[:, :, 0], bias[0]) if bent else torch.zeros_like(bias[0])]
    return d_grad, d_x, d_weight, d_bias


def _bend_sums(grad, x, outer: Outer, norm: Norm, sizes: Sizes, how: How) -> Tensor:
    """`[T, segments, 2, C]`: the sums of e and e n."""
    parts, windows_per_part = split(x.shape[0], sizes, how)
    partial = parts_to_sum(x, parts, 2, sizes)
    launch(
        bend_sums_kernel,
        partial.shape[0] * parts * blocks(sizes.channels, how.BLOCK_C),
        grad,
        x,
        outer,
        partial,
        norm,
        sizes,
        parts,
        windows_per_part,
        HOW=how,
    )
    return summed(partial, sizes)


def _weight_totals(totals: Tensor, bends: Tensor | None, means: Tensor | None, norm: Norm, sizes: Sizes, how: How):
    """What each segment `[T, segments, C]` has of d_weight."""
    g, gn, vg, _, _ = totals.unbind(2)
    if means is not None:
        mean_v, a = means[:, :, 3:5].repeat_interleave(sizes.per_group, 3).unbind(2)
        vg = vg - mean_v * g - a * gn
    if how.NORM != NONE:
        vg = vg * (norm.var + how.EPS).rsqrt().repeat_interleave(sizes.per_group, 2)
    return vg if bends is None else vg + bends[:, :, 1]
