"""Products of a task's rows with weights, by one program: what forward, deltas, gradients and tangents are made of."""

from __future__ import annotations

import triton
import triton.language as tl

from fastmeta.kernels._common import multiply_add
from fastmeta.kernels.inner_loop.structures import Tile


@triton.jit
def tile_of(first, start, rows, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """The tile from row `first` and column `start` on, of a matrix `[rows, columns]`."""
    m, n = first + tl.arange(0, HEIGHT), start + tl.arange(0, WIDTH)
    m_mask, n_mask = (m < rows)[:, None], (n < columns)[None, :]
    return Tile(m, n, m_mask, n_mask, m_mask & n_mask, m[:, None] * columns + n[None, :])


@triton.jit
def add_product(
    total,
    a,
    a_stride,
    b,
    b_stride,
    tile,
    K,
    HOW: tl.constexpr,
    A_TRANSPOSED: tl.constexpr = False,
    B_TRANSPOSED: tl.constexpr = False,
):
    """`total` plus the tile of `a @ b`, a `[M, K]`, b `[K, N]`.

    TRANSPOSED: it lies there as `[K, M]`, or as `[N, K]`; strides are from row to row of what lies there. K are the
    columns of a weight, or where `a` is transposed rows.
    """
    BLOCK_K: tl.constexpr = HOW.BLOCK_R if A_TRANSPOSED else HOW.BLOCK_W
    a += (tile.m if A_TRANSPOSED else tile.m * a_stride)[:, None]
    b += (tile.n * b_stride if B_TRANSPOSED else tile.n)[None, :]
    # what is loaded here other threads have just stored: no load may begin before the barrier
    for start in tl.range(0, K, BLOCK_K, num_stages=1):
        k = start + tl.arange(0, BLOCK_K)
        k_mask = k < K
        a_at = k * a_stride if A_TRANSPOSED else k
        b_at = k if B_TRANSPOSED else k * b_stride
        left = tl.load(a + a_at[None, :], mask=tile.m_mask & k_mask[None, :], other=0)
        right = tl.load(b + b_at[:, None], mask=k_mask[:, None] & tile.n_mask, other=0)
        total = multiply_add(left, right, total, HOW.TF32)
    return total


@triton.jit
def copy_rows(source, to, rows, wide, columns, HOW: tl.constexpr):
    """Rows of `wide` columns to rows of `columns`; what is more is 1, the input of a bias."""
    for first in range(0, rows, HOW.BLOCK_R):
        r = first + tl.arange(0, HOW.BLOCK_R)[:, None]
        for start in range(0, columns, HOW.BLOCK_W):
            c = start + tl.arange(0, HOW.BLOCK_W)[None, :]
            value = tl.load(source + r * wide + c, mask=(r < rows) & (c < wide), other=1)
            tl.store(to + r * columns + c, value, mask=(r < rows) & (c < columns))


@triton.jit
def copy_state(source, to, size, HOW: tl.constexpr):
    for start in range(0, size, HOW.BLOCK_P):
        i = start + tl.arange(0, HOW.BLOCK_P)
        tl.store(to + i, tl.load(source + i, mask=i < size), mask=i < size)


@triton.jit
def add_state(source, to, size, HOW: tl.constexpr):
    for start in range(0, size, HOW.BLOCK_P):
        i = start + tl.arange(0, HOW.BLOCK_P)
        total = tl.load(to + i, mask=i < size) + tl.load(source + i, mask=i < size)
        tl.store(to + i, total, mask=i < size)
