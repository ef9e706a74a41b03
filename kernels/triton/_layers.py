"""One layer of a net per task, or of one that tasks share, `x [T, B, I] -> [T, B, O]`, and its gradients.

Values come before their activation, which is applied on loading: the gradient needs them in that form. A layer that all
tasks share entirely is computed once; where only its weights are shared, the rows of all tasks count as those of one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta.kernels._common import (
    accumulator,
    activate,
    activation_slope,
    blocks,
    launch,
    leading_size,
    multiply_add,
    tf32,
    tile,
    triton_accumulator,
)
from fastmeta.kernels._sums import sum_over_tasks, sum_rows

ENOUGH_PROGRAMS = 264  # two on each multiprocessor of a large GPU


class How(NamedTuple):
    """What a kernel is compiled for."""

    ACTIVATION: int
    TF32: bool
    ACC: Any
    BLOCK_B: int
    BLOCK_I: int
    BLOCK_O: int


class Sizes(NamedTuple):
    rows: int
    inputs: int
    outputs: int


class Strides(NamedTuple):
    """From task to task, 0 if they share it."""

    x: int
    weight: int
    bias: int


@triton.jit
def layer_kernel(x, weight, bias, out, sizes, strides, HAS_BIAS: tl.constexpr, HOW: tl.constexpr):
    """out = activation(x) weight^T + bias, `[T, B, IN] -> [T, B, OUT]`; strides are from task to task, 0 if shared."""
    B, IN, OUT = sizes.rows, sizes.inputs, sizes.outputs
    program = tl.program_id(0).to(tl.int64)
    o_blocks, b_blocks = tl.cdiv(OUT, HOW.BLOCK_O), tl.cdiv(B, HOW.BLOCK_B)
    o = (program % o_blocks) * HOW.BLOCK_O + tl.arange(0, HOW.BLOCK_O)
    b = (program // o_blocks % b_blocks) * HOW.BLOCK_B + tl.arange(0, HOW.BLOCK_B)
    task = program // o_blocks // b_blocks
    x += task * strides.x
    weight += task * strides.weight
    total = tl.full([HOW.BLOCK_B, HOW.BLOCK_O], 0, HOW.ACC)
    for start in range(0, IN, HOW.BLOCK_I):
        i = start + tl.arange(0, HOW.BLOCK_I)
        h = tl.load(x + b[:, None] * IN + i[None, :], mask=(b < B)[:, None] & (i < IN)[None, :], other=0).to(HOW.ACC)
        w = tl.load(weight + o[None, :] * IN + i[:, None], mask=(o < OUT)[None, :] & (i < IN)[:, None], other=0)
        total = multiply_add(activate(h, HOW.ACTIVATION), w.to(HOW.ACC), total, HOW.TF32)
    if HAS_BIAS:
        total += tl.load(bias + task * strides.bias + o, mask=o < OUT, other=0).to(HOW.ACC)[None, :]
    tl.store(
        out + (task * B + b)[:, None] * OUT + o[None, :],
        total.to(out.dtype.element_ty),
        mask=(b < B)[:, None] & (o < OUT)[None, :],
    )


@triton.jit
def input_bwd_kernel(grad, weight, before, out, sizes, strides, HOW: tl.constexpr):
    """out = (grad weight) * activation'(before), `[T, B, OUT] -> [T, B, IN]`."""
    B, IN, OUT = sizes.rows, sizes.inputs, sizes.outputs
    program = tl.program_id(0).to(tl.int64)
    i_blocks, b_blocks = tl.cdiv(IN, HOW.BLOCK_I), tl.cdiv(B, HOW.BLOCK_B)
    i = (program % i_blocks) * HOW.BLOCK_I + tl.arange(0, HOW.BLOCK_I)
    b = (program // i_blocks % b_blocks) * HOW.BLOCK_B + tl.arange(0, HOW.BLOCK_B)
    task = program // i_blocks // b_blocks
    grad += task * B * OUT
    weight += task * strides.weight
    total = tl.full([HOW.BLOCK_B, HOW.BLOCK_I], 0, HOW.ACC)
    for start in range(0, OUT, HOW.BLOCK_O):
        o = start + tl.arange(0, HOW.BLOCK_O)
        g = tl.load(grad + b[:, None] * OUT + o[None, :], mask=(b < B)[:, None] & (o < OUT)[None, :], other=0)
        at = o.to(tl.int64)[:, None] * IN + i[None, :]
        w = tl.load(weight + at, mask=(o < OUT)[:, None] & (i < IN)[None, :], other=0)
        total = multiply_add(g.to(HOW.ACC), w.to(HOW.ACC), total, HOW.TF32)
    mask = (b < B)[:, None] & (i < IN)[None, :]
    if HOW.ACTIVATION != 0:
        z = tl.load(before + task * strides.x + b[:, None] * IN + i[None, :], mask=mask, other=0).to(HOW.ACC)
        total *= activation_slope(z, HOW.ACTIVATION)
    tl.store(out + (task * B + b)[:, None] * IN + i[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def weight_bwd_kernel(grad, x, out, rows, rows_per_part, sizes, SHARED_X: tl.constexpr, HOW: tl.constexpr):
    """out `[parts, OUT, IN]` = grad^T activation(x) over the part's rows of grad `[rows, OUT]`, x `[rows, IN]`.

    The rows are those of all tasks; SHARED_X: x has those of one.
    """
    B, IN, OUT = sizes.rows, sizes.inputs, sizes.outputs
    program = tl.program_id(0).to(tl.int64)
    i_blocks, o_blocks = tl.cdiv(IN, HOW.BLOCK_I), tl.cdiv(OUT, HOW.BLOCK_O)
    i = (program % i_blocks) * HOW.BLOCK_I + tl.arange(0, HOW.BLOCK_I)
    o = (program // i_blocks % o_blocks) * HOW.BLOCK_O + tl.arange(0, HOW.BLOCK_O)
    part = program // i_blocks // o_blocks
    total = tl.full([HOW.BLOCK_O, HOW.BLOCK_I], 0, HOW.ACC)
    end = tl.minimum(part * rows_per_part + rows_per_part, rows)
    for start in range(part * rows_per_part, end, HOW.BLOCK_B):
        row = start + tl.arange(0, HOW.BLOCK_B)
        g = tl.load(grad + row[None, :] * OUT + o[:, None], mask=(row < end)[None, :] & (o < OUT)[:, None], other=0)
        x_row = row % B if SHARED_X else row
        h = tl.load(x + x_row[:, None] * IN + i[None, :], mask=(row < end)[:, None] & (i < IN)[None, :], other=0)
        # activation(0) of a row beyond the end meets a gradient of zero
        total = multiply_add(g.to(HOW.ACC), activate(h.to(HOW.ACC), HOW.ACTIVATION), total, HOW.TF32)
    tl.store(
        out + (part * OUT + o)[:, None] * IN + i[None, :],
        total.to(out.dtype.element_ty),
        mask=(o < OUT)[:, None] & (i < IN)[None, :],
    )


def stride(t: Tensor, tasks: int) -> int:
    """From a task to the next, 0 where they share it."""
    return t.shape[1:].numel() if t.shape[0] == tasks else 0


def _how(activation: int, dtype: torch.dtype, rows: int, inputs: int, outputs: int, summed: str) -> How:
    """summed: the side that is, in shorter steps: BLOCK_B, BLOCK_I or BLOCK_O."""
    fast = tf32(dtype)
    most = 32 if dtype == torch.float64 else 64
    step = 16 if dtype == torch.float64 or not fast else 32
    sides = {
        side: tile(size, step if side == summed else most, 16)  # tl.dot takes 16 at least
        for side, size in (("BLOCK_B", rows), ("BLOCK_I", inputs), ("BLOCK_O", outputs))
    }
    return How(activation, fast, triton_accumulator(dtype), **sides)


def layer_outputs(x: Tensor, weight: Tensor, bias: Tensor | None, activation: int, dtype: torch.dtype) -> Tensor:
    """activation(x) weight^T + bias, with as many tasks as any of the three has, in `dtype`."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    tasks = leading_size(tensors)
    rows, width = x.shape[1:]
    out = x.new_empty(tasks, rows, weight.shape[1], dtype=dtype)
    result = out
    if x.shape[0] == tasks and all(t.shape[0] == 1 for t in tensors[1:]):
        x, out = (t.view(1, tasks * rows, t.shape[2]) for t in (x, out))
        rows, tasks = tasks * rows, 1
    how = _how(activation, weight.dtype, rows, width, weight.shape[1], "BLOCK_I")
    launch(
        layer_kernel,
        tasks * blocks(rows, how.BLOCK_B) * blocks(weight.shape[1], how.BLOCK_O),
        x,
        weight,
        weight if bias is None else bias,
        out,
        Sizes(rows, width, weight.shape[1]),
        Strides(stride(x, tasks), stride(weight, tasks), 0 if bias is None else stride(bias, tasks)),
        HAS_BIAS=bias is not None,
        HOW=how,
    )
    return result


def input_gradient(grad: Tensor, weight: Tensor, before: Tensor | None, activation: int, dtype: torch.dtype) -> Tensor:
    """(grad weight) * activation'(before), `[T, B, O] -> [T, B, I]`, in `dtype`."""
    tasks, rows, width = grad.shape
    out = grad.new_empty(tasks, rows, weight.shape[2], dtype=dtype)
    result, before = out, out if before is None else before
    if weight.shape[0] == 1 and before.shape[0] == tasks:
        grad, out, before = (t.view(1, tasks * rows, t.shape[2]) for t in (grad, out, before))
        rows, tasks = tasks * rows, 1
    how = _how(activation, weight.dtype, rows, weight.shape[2], width, "BLOCK_O")
    launch(
        input_bwd_kernel,
        tasks * blocks(rows, how.BLOCK_B) * blocks(weight.shape[2], how.BLOCK_I),
        grad,
        weight,
        before,
        out,
        Sizes(rows, weight.shape[2], width),
        Strides(stride(before, tasks), stride(weight, tasks), 0),
        HOW=how,
    )
    return result


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, activation: int) -> Tensor:
    """grad^T activation(x), of the shape and dtype of `weight`."""
    tasks, rows, _ = grad.shape
    OUT, IN = weight.shape[1:]
    how = _how(activation, weight.dtype, rows, IN, OUT, "BLOCK_B")
    tiles = blocks(OUT, how.BLOCK_O) * blocks(IN, how.BLOCK_I)
    parts, rows_per_part = tasks, rows
    if weight.shape[0] != tasks:
        # few tiles: cut the rows into parts that are added up after, in their order
        rows_per_part = max(blocks(tasks * rows, blocks(ENOUGH_PROGRAMS, max(tiles, 1))), 4 * how.BLOCK_B)
        parts = max(1, blocks(tasks * rows, rows_per_part))
    final = parts == weight.shape[0]
    out = weight.new_empty(parts, OUT, IN, dtype=weight.dtype if final else accumulator(weight.dtype))
    launch(
        weight_bwd_kernel,
        parts * tiles,
        grad,
        x,
        out,
        tasks * rows,
        rows_per_part,
        Sizes(rows, IN, OUT),
        SHARED_X=x.shape[0] != tasks,
        HOW=how,
    )
    return out if final else sum_over_tasks(out, weight.dtype)


def bias_gradient(grad: Tensor, bias: Tensor) -> Tensor:
    if bias.shape[0] != grad.shape[0]:
        grad = grad.view(1, grad.shape[0] * grad.shape[1], grad.shape[2])
    return sum_rows(grad, bias.dtype)
