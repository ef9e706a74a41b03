"""What a call of `norm_act_pool` or of its gradients hands to the kernels."""

from __future__ import annotations

from torch import Tensor

from fastmeta.kernels._common import ACTIVATIONS, accumulator, blocks, tile, triton_accumulator
from fastmeta.kernels._layers import ENOUGH_PROGRAMS, stride
from fastmeta.kernels._sums import sum_rows
from fastmeta.kernels.conv.windows import GIVEN, NONE, OWN, How, Norm, Sizes

POOLS = ("none", "max", "average")


def prepared(x, weight, bias, moments, norm, groups, eps, activation, slope, pool) -> tuple[Norm, Sizes, How]:
    """The arguments of `norm_act_pool`, as kernels take them."""
    tasks, rows, height, width, channels = x.shape
    kind = {"none": NONE, "given": GIVEN}.get(norm, OWN)
    side = 1 if pool == "none" else 2
    images = 1 if norm == "group" else rows  # of a segment
    sizes = Sizes(
        windows=images * blocks(height, side) * blocks(width, side),
        windows_high=blocks(height, side),
        windows_wide=blocks(width, side),
        height=height,
        width=width,
        pixels=images * height * width,
        pooled=images * (height // side) * (width // side),
        channels=channels,
        per_group=max(channels // max(groups, 1), 1) if norm == "group" else 1,
        segments=rows if norm == "group" else 1,
    )
    # where there is none: 1 and 0, which change nothing
    weight = weight[0] if weight else x.new_ones(1, channels, dtype=accumulator(x.dtype))
    bias = bias[0] if bias else x.new_zeros(1, channels, dtype=accumulator(x.dtype))
    mean, var = moments or (x, x)
    pointers = Norm(mean, var, weight, bias, *(stride(t, tasks) for t in (mean, weight, bias)))
    side_c = tile(channels, 64)
    how = How(
        NORM=kind,
        EPS=eps,
        ACTIVATION=ACTIVATIONS.index(activation),
        SLOPE=slope if activation == "relu" else 0.0,
        POOL=POOLS.index(pool),
        ACC=triton_accumulator(x.dtype),
        BLOCK_P=tile(sizes.windows, 512 // side_c),
        BLOCK_C=side_c,
    )
    return pointers, sizes, how


def programs(tasks: int, sizes: Sizes, how: How) -> int:
    """One for each tile of windows and channels."""
    return tasks * sizes.segments * blocks(sizes.windows, how.BLOCK_P) * blocks(sizes.channels, how.BLOCK_C)


def split(tasks: int, sizes: Sizes, how: How) -> tuple[int, int]:
    """How many parts a segment's windows are summed in, and windows of a part, which are whole blocks."""
    columns = tasks * sizes.segments * blocks(sizes.channels, how.BLOCK_C)
    windows = blocks(sizes.windows, blocks(ENOUGH_PROGRAMS, max(columns, 1)))
    windows = max(blocks(windows, how.BLOCK_P), 4) * how.BLOCK_P
    return max(1, blocks(sizes.windows, windows)), windows


def group_means(totals: Tensor, weight: Tensor | None, sizes: Sizes) -> Tensor:
    """Of sums `[T, segments, K, C]`, each times its channel's weight `[T or 1, C]`, the means over pixels and channels
    of a group, `[T, segments, K, G]`."""
    if weight is not None:
        totals = totals * weight[:, None, None]
    return totals.unflatten(3, (-1, sizes.per_group)).sum(4) / (sizes.pixels * sizes.per_group)


def gradient_of_tasks(total: Tensor, like: Tensor) -> Tensor:
    """Of sums `[T, segments, C]` those of a task's segments, or of all tasks' where they share what it is for."""
    lead, (tasks, segments, channels) = like.shape[0], total.shape
    length = segments if lead == tasks else tasks * segments
    return sum_rows(total.reshape(lead, length, channels).contiguous(), like.dtype)
