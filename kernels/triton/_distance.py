"""The distance of a tile of queries to a tile of prototypes, in registers."""

from __future__ import annotations

import triton
import triton.language as tl

EPS = tl.constexpr(1e-8)  # cosine: norms count at least this much, as in torch.nn.functional.cosine_similarity


@triton.jit
def at_least_eps(norm):
    """`max(norm, EPS)`; tl.maximum would make a number of NaN."""
    least = tl.full([1], EPS, norm.dtype)  # a bare number would arrive rounded to float32
    return tl.where(norm < least, least, norm)


@triton.jit
def load_transposed(x, row, rows, D, start, ACC: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns from `start` of the given rows of x `[rows, D]`, as `[BLOCK_D, len(row)]`; 0 outside."""
    d = start + tl.arange(0, BLOCK_D)
    at = row[None, :] * D + d[:, None]
    return tl.load(x + at, mask=(row < rows)[None, :] & (d < D)[:, None], other=0).to(ACC)


@triton.jit
def distance_tile(
    query,
    prototypes,
    q,
    n,
    Q,
    N,
    D,
    METRIC: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`[BLOCK_Q, BLOCK_N]` of rows `q` of query `[Q, D]` and rows `n` of prototypes `[N, D]`.

    The dimension that is summed stands first in the three-dimensional products: there it lies within one thread, so
    that the sum needs no exchange between threads.
    """
    total = tl.zeros([BLOCK_Q, BLOCK_N], ACC)
    q_squared = tl.zeros([BLOCK_Q], ACC)
    n_squared = tl.zeros([BLOCK_N], ACC)
    for start in range(0, D, BLOCK_D):
        a = load_transposed(query, q, Q, D, start, ACC, BLOCK_D)
        b = load_transposed(prototypes, n, N, D, start, ACC, BLOCK_D)
        if METRIC <= 1:
            difference = a[:, :, None] - b[:, None, :]
            total += tl.sum(difference * difference, 0)
        elif METRIC == 4:
            total += tl.sum(tl.abs(a[:, :, None] - b[:, None, :]), 0)
        else:
            total += tl.sum(a[:, :, None] * b[:, None, :], 0)
        if METRIC == 2:
            q_squared += tl.sum(a * a, 0)
            n_squared += tl.sum(b * b, 0)
    if METRIC == 1:
        return tl.sqrt(total)
    elif METRIC == 2:
        return 1 - total / (at_least_eps(tl.sqrt(q_squared))[:, None] * at_least_eps(tl.sqrt(n_squared))[None, :])
    elif METRIC == 3:
        return -total
    else:
        return total


@triton.jit
def row_norms(x, row, rows, D, ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """max(|x|, EPS) of the given rows of x `[rows, D]`."""
    squared = tl.zeros([BLOCK], ACC)
    for start in range(0, D, BLOCK_D):
        a = load_transposed(x, row, rows, D, start, ACC, BLOCK_D)
        squared += tl.sum(a * a, 0)
    return at_least_eps(tl.sqrt(squared))
