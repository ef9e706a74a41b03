"""A norm, an activation and a 2x2 pool in one pass over images, and their gradients.

With n = (x - mean) rate, z = n weight + bias, and g the gradient at z, that of the pool's output led to the pixels that
have it, times the slope of the activation:

    d_bias = sum g,    d_weight = sum g n,    d_x = rate (h - mean h - n mean(h n)),    h = weight g

where the moments are the segment's own; of given moments, and without a norm, the means are no part of it. One pass
sums, one writes d_x. Nothing is kept from the forward: both form z anew, and find the largest of a window by it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta.kernels._channel_sums import channel_sums
from fastmeta.kernels._common import launch
from fastmeta.kernels._norm_moments import norm_moments
from fastmeta.kernels._norm_second import norm_act_pool_bwd_bwd
from fastmeta.kernels.conv.call import gradient_of_tasks, group_means, prepared, programs
from fastmeta.kernels.conv.windows import (
    OWN,
    activated,
    channels_of,
    group_mean,
    pooled,
    put_together,
    read,
    taken_apart,
    tile_of,
    times_slope,
)


@triton.jit
def norm_act_pool_kernel(x, out, norm, sizes, HOW: tl.constexpr):
    segment, window, block = tile_of(sizes, HOW)
    channels = channels_of(norm, segment, block, sizes, HOW)
    x += segment * sizes.pixels * sizes.channels
    seen = read(x, window, channels, sizes, HOW)
    value = put_together(activated(seen.z, HOW), seen, HOW)
    at, mask = pooled(window, channels, sizes, HOW)
    tl.store(out + segment * sizes.pooled * sizes.channels + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def norm_data_kernel(grad, x, means, out, norm, sizes, HOW: tl.constexpr):
    """d_x; means `[segments, 2, G]`: of h and h n."""
    segment, window, block = tile_of(sizes, HOW)
    channels = channels_of(norm, segment, block, sizes, HOW)
    x += segment * sizes.pixels * sizes.channels
    out += segment * sizes.pixels * sizes.channels
    seen = read(x, window, channels, sizes, HOW)
    grad += segment * sizes.pooled * sizes.channels
    h = times_slope(taken_apart(grad, window, seen, channels, sizes, HOW), seen.z, HOW) * channels.weight
    if HOW.NORM == 2:
        mean_h = group_mean(means, segment * 2, channels, sizes, HOW)
        h -= mean_h + seen.n * group_mean(means, segment * 2 + 1, channels, sizes, HOW)
    tl.store(out + seen.at, (h * channels.rate).to(out.dtype.element_ty), mask=seen.mask)


def norm_act_pool(x, weight, bias, moments, *options) -> Tensor:
    norm, sizes, how = prepared(x, weight, bias, moments, *options)
    tasks, rows, height, width, channels = x.shape
    side = 1 if how.POOL == 0 else 2
    out = x.new_empty(tasks, rows, height // side, width // side, channels)
    launch(norm_act_pool_kernel, programs(tasks, sizes, how) if out.numel() else 0, x, out, norm, sizes, HOW=how)
    return out


def norm_act_pool_bwd(grad, x, weight, bias, moments, *options_and_needs) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    *options, needs = options_and_needs
    norm, sizes, how = prepared(x, weight, bias, moments, *options)
    means, d_x = x, x.new_empty(0)
    d_weight, d_bias = [w.new_empty(0) for w in weight], [b.new_empty(0) for b in bias]
    own = how.NORM == OWN and needs & 1
    if own or needs & 6 and (weight or bias):
        totals = channel_sums(None, grad, x, norm, sizes, how)
        if needs & 2:
            d_weight = [gradient_of_tasks(totals[:, :, 1], w) for w in weight]
        if needs & 4:
            d_bias = [gradient_of_tasks(totals[:, :, 0], b) for b in bias]
        if own:
            means = group_means(totals, norm.weight, sizes)
    if needs & 1:
        d_x = torch.empty_like(x)
        launch(norm_data_kernel, programs(x.shape[0], sizes, how), grad, x, means, d_x, norm, sizes, HOW=how)
    return d_x, d_weight, d_bias


def aot(new):
    """Representative calls, for compilation ahead of time; `new(*shape)` makes a tensor."""
    for T, B, side, C, norm, groups, activation, pool in (
        (4, 75, 28, 64, "batch", 1, "relu", "max"),
        (4, 5, 7, 96, "group", 8, "gelu", "average"),
        (2, 5, 7, 64, "none", 1, "identity", "none"),
    ):
        x, weight, bias = new(T, B, side, side, C), [new(T, C)], [new(T, C)]
        grad = new(T, B, *(side if pool == "none" else side // 2,) * 2, C)
        size = (T, 1, C) if norm == "batch" else (T, B, groups)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        moments = [] if norm == "none" else [new(*size, dtype=wide), new(*size, dtype=wide)]
        args = (x, weight, bias, moments, norm, groups, 1e-5, activation, 0.0, pool)
        norm_act_pool(*args)
        norm_act_pool_bwd(grad, *args, 7)
        norm_act_pool_bwd_bwd(torch.empty_like(x), weight, bias, grad, *args, 7, 15)
    norm_moments(new(4, 75, 28, 28, 64), "batch", 1)
