"""Sums over rows in a fixed order: what gradients of shared tensors end in, in place of atomics."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta.kernels._common import blocks, launch, tile, triton_accumulator, warps

ROWS = 256  # summed by one program; what is longer is summed in a tree


@triton.jit
def sum_rows_kernel(
    x,
    out,
    length,
    columns,
    parts,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """x `[segments, length, columns]` -> out `[segments, parts, columns]`, each part the sum of `ROWS` rows."""
    column_blocks = tl.cdiv(columns, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    column = (program % column_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    segment_part = program // column_blocks
    segment, part = segment_part // parts, segment_part % parts
    total = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    for start in range(part * ROWS, tl.minimum(part * ROWS + ROWS, length), BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < length)[:, None] & (column < columns)[None, :]
        at = (segment * length + row)[:, None] * columns + column[None, :]
        total += tl.load(x + at, mask=mask, other=0).to(ACC)
    value = tl.sum(total, 0).to(out.dtype.element_ty)
    tl.store(out + segment_part * columns + column, value, mask=column < columns)


def sum_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x `[segments, length, columns]` -> `[segments, columns]` in `dtype`; the sum of no rows is 0."""
    segments, length, columns = x.shape
    while True:
        parts = max(1, blocks(length, ROWS))
        out = x.new_empty(segments, parts, columns, dtype=dtype if parts == 1 else x.dtype)
        rows, side = tile(length, 16), tile(columns, 128)
        launch(
            sum_rows_kernel,
            segments * parts * blocks(columns, side),
            x,
            out,
            length,
            columns,
            parts,
            ROWS=ROWS,
            ACC=triton_accumulator(x.dtype),
            BLOCK_R=rows,
            BLOCK_C=side,
            num_warps=warps(rows * side),
        )
        if parts == 1:
            return out.view(segments, columns)
        x, length = out, parts


def sum_over_tasks(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x `[T, ...]` -> `[1, ...]` in `dtype`."""
    if x.shape[0] == 1:
        return x.to(dtype)
    columns = math.prod(x.shape[1:])  # not -1: reshape cannot tell it of a tensor without elements
    return sum_rows(x.reshape(1, x.shape[0], columns), dtype).view(1, *x.shape[1:])
