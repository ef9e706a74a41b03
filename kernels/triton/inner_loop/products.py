"""Products of a task's rows with weights, by one program: what forward, deltas, gradients and tangents are made of."""

from __future__ import annotations

import triton
import triton.language as tl

from fastmeta.kernels._common import multiply_add


@triton.jit
def add_product(
    total,
    a,
    a_stride,
    b,
    b_stride,
    m,
    n,
    m_mask,
    n_mask,
    K,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`total` plus rows `m` and columns `n` of `a @ b`, a `[M, K]`, b `[K, N]`.

    TRANSPOSED: it lies there as `[K, M]`, or as `[N, K]`; strides are from row to row of what lies there.
    m_mask `[BLOCK_M, 1]`, n_mask `[1, BLOCK_N]`.
    """
    a += (m if A_TRANSPOSED else m * a_stride)[:, None]
    b += (n * b_stride if B_TRANSPOSED else n)[None, :]
    # what is loaded here other threads have just stored: no load may begin before the barrier
    for start in tl.range(0, K, BLOCK_K, num_stages=1):
        k = start + tl.arange(0, BLOCK_K)
        k_mask = k < K
        a_at = k * a_stride if A_TRANSPOSED else k
        b_at = k if B_TRANSPOSED else k * b_stride
        left = tl.load(a + a_at[None, :], mask=m_mask & k_mask[None, :], other=0)
        right = tl.load(b + b_at[:, None], mask=k_mask[:, None] & n_mask, other=0)
        total = multiply_add(left, right, total, PRECISION)
    return total


@triton.jit
def copy_rows(source, to, rows, wide, columns, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    """Rows of `wide` columns to rows of `columns`; what is more is 1, the input of a bias."""
    for first in range(0, rows, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)[:, None]
        for start in range(0, columns, BLOCK_W):
            c = start + tl.arange(0, BLOCK_W)[None, :]
            value = tl.load(source + r * wide + c, mask=(r < rows) & (c < wide), other=1)
            tl.store(to + r * columns + c, value, mask=(r < rows) & (c < columns))


@triton.jit
def copy_state(source, to, size, BLOCK_P: tl.constexpr):
    for start in range(0, size, BLOCK_P):
        i = start + tl.arange(0, BLOCK_P)
        tl.store(to + i, tl.load(source + i, mask=i < size), mask=i < size)


@triton.jit
def add_state(source, to, size, BLOCK_P: tl.constexpr):
    for start in range(0, size, BLOCK_P):
        i = start + tl.arange(0, BLOCK_P)
        total = tl.load(to + i, mask=i < size) + tl.load(source + i, mask=i < size)
        tl.store(to + i, total, mask=i < size)
