"""A convolution per task, channels last, and its two gradients: matrix products whose left matrix is never formed
(`conv/gather.py`).

The gradient for the images is a gather as well: an image's pixel reads the pixels of the output whose windows hold it.
So one kernel serves both. That for the weights sums over pixels, in parts where few programs would have it all, which
are added up in their order. Where the tasks share the weights, the rows of all tasks count as those of one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta.kernels._common import (
    INTERPRETED,
    accumulator,
    blocks,
    launch,
    leading_size,
    multiply_add,
    step,
    tf32,
    tile,
    triton_accumulator,
)
from fastmeta.kernels._layers import ENOUGH_PROGRAMS, stride
from fastmeta.kernels._sums import sum_rows
from fastmeta.kernels.conv.gather import Sizes, gathered, taps_and_channels
from fastmeta.kernels.conv.images import out_size


class How(NamedTuple):
    """What a kernel is compiled for."""

    TF32: bool
    OPERAND: Any  # what is multiplied, and
    ACC: Any  # added up
    ONE_TAP: bool
    BLOCK_P: int
    BLOCK_O: int
    BLOCK_K: int


class Strides(NamedTuple):
    """From task to task, 0 if they share it."""

    source: int
    weight: int
    bias: int


@triton.jit
def conv_kernel(
    source,
    weight,
    bias,
    out,
    sizes,
    strides,
    HAS_BIAS: tl.constexpr,
    BACK: tl.constexpr,
    HOW: tl.constexpr,
):
    """out `[T, pixels, groups, outputs]` from source `[T, source pixels, groups, inputs]` and weight `[T, taps, inputs,
    groups, outputs]`; BACK: the gradient of a convolution for its images, from that of its output."""
    program = tl.program_id(0).to(tl.int64)
    o_blocks, p_blocks = tl.cdiv(sizes.outputs, HOW.BLOCK_O), tl.cdiv(sizes.pixels, HOW.BLOCK_P)
    o = (program % o_blocks).to(tl.int32) * HOW.BLOCK_O + tl.arange(0, HOW.BLOCK_O)
    pixel = (program // o_blocks % p_blocks).to(tl.int32) * HOW.BLOCK_P + tl.arange(0, HOW.BLOCK_P)
    task, group = program // o_blocks // p_blocks // sizes.groups, program // o_blocks // p_blocks % sizes.groups
    source += task * strides.source + group * sizes.inputs
    weight += task * strides.weight + group * sizes.outputs
    row = sizes.groups * sizes.outputs
    total = tl.full([HOW.BLOCK_P, HOW.BLOCK_O], 0, HOW.ACC)
    for start in range(0, sizes.columns, HOW.BLOCK_K):
        k = start + tl.arange(0, HOW.BLOCK_K)
        tap, channel = taps_and_channels(start, sizes.inputs, HOW.BLOCK_K, HOW.ONE_TAP)
        at, inside = gathered(pixel, tap, sizes, BACK)
        at = at.to(tl.int64) * (sizes.groups * sizes.inputs) + channel[None, :]
        x = tl.load(source + at, mask=inside & (k < sizes.columns)[None, :], other=0)
        mask = (k < sizes.columns)[:, None] & (o < sizes.outputs)[None, :]
        w = tl.load(weight + k.to(tl.int64)[:, None] * row + o[None, :], mask=mask, other=0)
        total = multiply_add(x.to(HOW.OPERAND), w.to(HOW.OPERAND), total, HOW.TF32)
    if HAS_BIAS:
        b = tl.load(bias + task * strides.bias + group * sizes.outputs + o, mask=o < sizes.outputs, other=0)
        total += b.to(HOW.ACC)[None, :]
    out += task * sizes.pixels * row + group * sizes.outputs
    mask = (pixel < sizes.pixels)[:, None] & (o < sizes.outputs)[None, :]
    tl.store(out + pixel.to(tl.int64)[:, None] * row + o[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def conv_weight_kernel(grad, x, out, sizes, strides, parts, pixels_per_part, HOW: tl.constexpr):
    """out `[T, parts, groups, outputs, inputs, taps]`, each part the sum over its pixels of grad `[T, pixels, groups,
    outputs]` times what the convolution reads there of x `[T, source pixels, groups, inputs]`."""
    program = tl.program_id(0).to(tl.int64)
    k_blocks, o_blocks = tl.cdiv(sizes.columns, HOW.BLOCK_K), tl.cdiv(sizes.outputs, HOW.BLOCK_O)
    first = (program % k_blocks).to(tl.int32) * HOW.BLOCK_K
    k = first + tl.arange(0, HOW.BLOCK_K)
    o = (program // k_blocks % o_blocks).to(tl.int32) * HOW.BLOCK_O + tl.arange(0, HOW.BLOCK_O)
    task_part, group = program // k_blocks // o_blocks // sizes.groups, program // k_blocks // o_blocks % sizes.groups
    task, part = task_part // parts, (task_part % parts).to(tl.int32)
    grad += task * strides.weight + group * sizes.outputs
    x += task * strides.source + group * sizes.inputs
    row = sizes.groups * sizes.outputs
    tap, channel = taps_and_channels(first, sizes.inputs, HOW.BLOCK_K, HOW.ONE_TAP)
    total = tl.full([HOW.BLOCK_O, HOW.BLOCK_K], 0, HOW.ACC)
    end = tl.minimum(part * pixels_per_part + pixels_per_part, sizes.pixels)
    for start in range(part * pixels_per_part, end, HOW.BLOCK_P):
        pixel = start + tl.arange(0, HOW.BLOCK_P)
        mask = (pixel < end)[None, :] & (o < sizes.outputs)[:, None]
        g = tl.load(grad + pixel.to(tl.int64)[None, :] * row + o[:, None], mask=mask, other=0)
        at, inside = gathered(pixel, tap, sizes, False)
        at = at.to(tl.int64) * (sizes.groups * sizes.inputs) + channel[None, :]
        h = tl.load(x + at, mask=inside & (pixel < end)[:, None] & (k < sizes.columns)[None, :], other=0)
        total = multiply_add(g.to(HOW.OPERAND), h.to(HOW.OPERAND), total, HOW.TF32)
    out += (task_part * row + group * sizes.outputs) * sizes.columns
    at = o.to(tl.int64)[:, None] * sizes.columns + (channel * sizes.taps + tap)[None, :]
    mask = (o < sizes.outputs)[:, None] & (k < sizes.columns)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


def _how(sizes: Sizes, dtype: torch.dtype, summed: str) -> How:
    """summed: the side that is, in shorter steps: BLOCK_P or BLOCK_K."""
    fast, double = tf32(dtype), dtype == torch.float64
    most = {"BLOCK_P": 32, "BLOCK_O": 32, "BLOCK_K": 32} if double else {"BLOCK_P": 64, "BLOCK_O": 64, "BLOCK_K": 64}
    most[summed] = step(32 if fast else 16)
    whole = {"BLOCK_P": sizes.pixels, "BLOCK_O": sizes.outputs, "BLOCK_K": sizes.columns}
    sides = {side: tile(size, most[side], 16) for side, size in whole.items()}  # tl.dot takes 16 at least
    # tensor cores take half precision as it is; the interpreter has no bfloat16
    operand = triton_accumulator(dtype)
    if dtype in (torch.float16, torch.bfloat16) and not INTERPRETED:
        operand = tl.float16 if dtype == torch.float16 else tl.bfloat16
    one_tap = sizes.inputs % sides["BLOCK_K"] == 0
    return How(fast, operand, triton_accumulator(dtype), one_tap, **sides)


def _convolve(source, weight, bias: list[Tensor], shape, window, groups: int, geometry, back: bool) -> Tensor:
    """`conv_kernel` to images of `shape` `[B, H, W, C]`; weight `[T, taps, inputs, groups, outputs]`."""
    tasks = leading_size([source, weight, *bias])
    out = source.new_empty(tasks, *shape)
    result = out
    if source.shape[0] == tasks and all(t.shape[0] == 1 for t in (weight, *bias)):
        source, out = (t.view(1, tasks * shape[0], *t.shape[2:]) for t in (source, out))
        tasks = 1
    taps, inputs, _, outputs = weight.shape[1:]
    sizes = Sizes(
        out.shape[1] * out.shape[2] * out.shape[3],
        *out.shape[2:4],
        outputs,
        *source.shape[2:4],
        inputs,
        taps * inputs,
        groups,
        taps,
        window[1],
        *geometry,
    )
    how = _how(sizes, source.dtype, "BLOCK_K")
    launch(
        conv_kernel,
        tasks * groups * blocks(sizes.pixels, how.BLOCK_P) * blocks(outputs, how.BLOCK_O),
        source,
        weight,
        bias[0] if bias else weight,
        out,
        sizes,
        Strides(stride(source, tasks), stride(weight, tasks), stride(bias[0], tasks) if bias else 0),
        HAS_BIAS=bool(bias),
        BACK=back,
        HOW=how,
    )
    return result


def _by_taps(weight: Tensor, groups: int, order: tuple[int, ...]) -> Tensor:
    """A weight as the kernel reads it, side by side in memory; order: of task, group, output, input and window."""
    tasks, outputs, inputs, *window = weight.shape
    split = weight.view(tasks, groups, outputs // groups, inputs, *window)
    return split.permute(order).flatten(1, 2).contiguous()


def task_conv2d(x: Tensor, weight: Tensor, bias: list[Tensor], *geometry: int) -> Tensor:
    *geometry, groups = geometry
    window = weight.shape[3:]
    shape = (x.shape[1], *out_size(x.shape[2:4], window, *geometry), weight.shape[1])
    return _convolve(x, _by_taps(weight, groups, (0, 4, 5, 3, 1, 2)), bias, shape, window, groups, geometry, False)


def task_conv2d_bwd_data(grad: Tensor, weight: Tensor, height: int, width: int, *geometry: int) -> Tensor:
    *geometry, groups = geometry
    shape = (grad.shape[1], height, width, weight.shape[2] * groups)
    weight_by_taps = _by_taps(weight, groups, (0, 4, 5, 2, 1, 3))
    return _convolve(grad, weight_by_taps, [], shape, weight.shape[3:], groups, geometry, True)


def task_conv2d_bwd_weight(grad: Tensor, x: Tensor, kernel_h: int, kernel_w: int, *geometry: int) -> Tensor:
    *geometry, groups = geometry
    tasks, inputs, outputs = leading_size([grad, x]), x.shape[4] // groups, grad.shape[4] // groups
    pixels, taps = grad.shape[1:4].numel(), kernel_h * kernel_w
    sizes = Sizes(
        pixels, *grad.shape[2:4], outputs, *x.shape[2:4], inputs, taps * inputs, groups, taps, kernel_w, *geometry
    )
    how = _how(sizes, x.dtype, "BLOCK_P")
    tiles = tasks * groups * blocks(outputs, how.BLOCK_O) * blocks(sizes.columns, how.BLOCK_K)
    pixels_per_part = max(blocks(pixels, blocks(ENOUGH_PROGRAMS, max(tiles, 1))), 4 * how.BLOCK_P)
    parts = max(1, blocks(pixels, pixels_per_part))
    shape = (groups * outputs, inputs, kernel_h, kernel_w)
    out = x.new_empty(tasks, parts, *shape, dtype=x.dtype if parts == 1 else accumulator(x.dtype))
    launch(
        conv_weight_kernel,
        tiles * parts,
        grad,
        x,
        out,
        sizes,
        Strides(stride(x, tasks), stride(grad, tasks), 0),
        parts,
        pixels_per_part,
        HOW=how,
    )
    return (out if parts == 1 else sum_rows(out.flatten(2), x.dtype)).view(tasks, *shape)


def aot(new):
    """Representative calls, for compilation ahead of time; `new(*shape)` makes a tensor."""
    for side, inputs, bias in ((14, 64, [new(4, 64)]), (28, 1, [])):
        x, weight, grad = new(4, 75, side, side, inputs), new(4, 64, inputs, 3, 3), new(4, 75, side, side, 64)
        geometry = (1, 1, 1, 1, 1, 1, 1)
        task_conv2d(x, weight, bias, *geometry)
        task_conv2d_bwd_data(grad, weight, side, side, *geometry)
        task_conv2d_bwd_weight(grad, x, 3, 3, *geometry)
