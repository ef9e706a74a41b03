"""Distances `[T, Q, D], [T, N, D] -> [T, Q, N]` and their gradient.

The gradient of every metric is a sum over the other side's rows with weights that depend on the pair alone:

    sqeuclidean, euclidean  sum_n w (q - p_n)          w = 2 g,  g / d
    manhattan               sum_n w sign(q - p_n)      w = g
    dot                     sum_n w p_n                w = -g
    cosine                  sum_n w p_n + q sum_n v / |q|^2        w = -g / (|q| |p_n|),  v = g (1 - d)

and the same with the sides swapped. Where the weights need the distance they are formed first (`weights_kernel`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta.kernels._common import METRICS, accumulator, blocks, launch, step, tile, triton_accumulator, warps
from fastmeta.kernels._distance import EPS, distance_tile, row_norms


@triton.jit
def distance_kernel(
    query,
    prototypes,
    out,
    Q,
    N,
    D,
    METRIC: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    q_blocks, n_blocks = tl.cdiv(Q, BLOCK_Q), tl.cdiv(N, BLOCK_N)
    n = (program % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    q = (program // n_blocks % q_blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    task = program // n_blocks // q_blocks
    distance = distance_tile(
        query + task * Q * D, prototypes + task * N * D, q, n, Q, N, D, METRIC, ACC, BLOCK_Q, BLOCK_N, BLOCK_D
    )
    tl.store(
        out + (task * Q + q)[:, None] * N + n[None, :],
        distance.to(out.dtype.element_ty),
        mask=(q < Q)[:, None] & (n < N)[None, :],
    )


@triton.jit
def pair_weights(
    grad, distance, query, prototypes, q, n, Q, N, D, METRIC: tl.constexpr, ACC: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """w and v of the table above from the gradient and the distance of a tile; v is 0 for all but cosine."""
    if METRIC == 0:
        return 2 * grad, grad * 0
    elif METRIC == 1:
        # at distance 0 the gradient counts as 0
        return tl.where(distance == 0, 0.0, grad / tl.where(distance == 0, 1.0, distance)), grad * 0
    elif METRIC == 2:
        q_norm = row_norms(query, q, Q, D, ACC, BLOCK_Q, BLOCK_D)
        n_norm = row_norms(prototypes, n, N, D, ACC, BLOCK_N, BLOCK_D)
        return -grad / (q_norm[:, None] * n_norm[None, :]), grad * (1 - distance)
    elif METRIC == 3:
        return -grad, grad * 0
    else:
        return grad, grad * 0


@triton.jit
def weights_kernel(
    grad,
    query,
    prototypes,
    weights,
    slopes,
    Q,
    N,
    D,
    METRIC: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """weights and (cosine) slopes `[T, Q, N]`: w and v of the table above."""
    program = tl.program_id(0).to(tl.int64)
    q_blocks, n_blocks = tl.cdiv(Q, BLOCK_Q), tl.cdiv(N, BLOCK_N)
    n = (program % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    q = (program // n_blocks % q_blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    task = program // n_blocks // q_blocks
    at = (task * Q + q)[:, None] * N + n[None, :]
    mask = (q < Q)[:, None] & (n < N)[None, :]
    query += task * Q * D
    prototypes += task * N * D
    distance = distance_tile(query, prototypes, q, n, Q, N, D, METRIC, ACC, BLOCK_Q, BLOCK_N, BLOCK_D)
    g = tl.load(grad + at, mask=mask, other=0).to(ACC)
    w, v = pair_weights(g, distance, query, prototypes, q, n, Q, N, D, METRIC, ACC, BLOCK_Q, BLOCK_N, BLOCK_D)
    tl.store(weights + at, w, mask=mask)
    if METRIC == 2:
        tl.store(slopes + at, v, mask=mask)


@triton.jit
def distance_bwd_kernel(
    own,
    others,
    weights,
    slopes,
    out,
    R,
    C,
    D,
    row_stride,
    column_stride,
    scale,
    METRIC: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of own `[T, R, D]`, others being `[T, C, D]` and weights, slopes a task's `[R, C]` by strides."""
    program = tl.program_id(0).to(tl.int64)
    d_blocks, r_blocks = tl.cdiv(D, BLOCK_D), tl.cdiv(R, BLOCK_R)
    d = (program % d_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = (program // d_blocks % r_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    task = program // d_blocks // r_blocks
    own += task * R * D
    others += task * C * D
    weights += task * R * C
    slopes += task * R * C
    own_mask = (r < R)[:, None] & (d < D)[None, :]
    x = tl.load(own + r[:, None] * D + d[None, :], mask=own_mask, other=0).to(ACC)
    total = tl.zeros([BLOCK_R, BLOCK_D], ACC)
    slope = tl.zeros([BLOCK_R], ACC)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C).to(tl.int64)
        pair = c[:, None] * column_stride + r[None, :] * row_stride
        pair_mask = (c < C)[:, None] & (r < R)[None, :]
        w = tl.load(weights + pair, mask=pair_mask, other=0).to(ACC)
        y = tl.load(others + c[:, None] * D + d[None, :], mask=(c < C)[:, None] & (d < D)[None, :], other=0).to(ACC)
        if METRIC <= 1:
            # no difference beyond the last of the others: weight 0 would make NaN of an infinite one
            difference = tl.where((c < C)[:, None, None], x[None, :, :] - y[:, None, :], 0.0)
            total += tl.sum(w[:, :, None] * difference, 0)
        elif METRIC == 4:
            sign = (x[None, :, :] > y[:, None, :]).to(ACC) - (x[None, :, :] < y[:, None, :]).to(ACC)
            total += tl.sum(w[:, :, None] * sign, 0)
        else:
            total += tl.sum(w[:, :, None] * y[:, None, :], 0)
        if METRIC == 2:
            slope += tl.sum(tl.load(slopes + pair, mask=pair_mask, other=0).to(ACC), 0)
    total *= scale
    if METRIC == 2:
        norm = row_norms(own, r, R, D, ACC, BLOCK_R, BLOCK_D)
        # a norm below EPS counts as a constant
        total += x * tl.where(norm <= EPS, 0.0, slope / (norm * norm))[:, None]
    tl.store(out + task * R * D + r[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask=own_mask)


def distance_sides(Q: int, N: int, D: int, dtype: torch.dtype, metric: str) -> tuple[int, int, int]:
    """Sides of the tile of a distance: smaller where an entry takes more registers."""
    double = dtype == torch.float64
    return tile(Q, 16 if double or metric == "cosine" else 32), tile(N, 16 if double else 32), tile(D, step(8))


def pairwise_distance(query: Tensor, prototypes: Tensor, metric: str) -> Tensor:
    tasks, Q, D = query.shape
    N = prototypes.shape[1]
    out = query.new_empty(tasks, Q, N)
    side_q, side_n, side_d = distance_sides(Q, N, D, query.dtype, metric)
    launch(
        distance_kernel,
        tasks * blocks(Q, side_q) * blocks(N, side_n),
        query,
        prototypes,
        out,
        Q,
        N,
        D,
        METRIC=METRICS.index(metric),
        ACC=triton_accumulator(query.dtype),
        BLOCK_Q=side_q,
        BLOCK_N=side_n,
        BLOCK_D=side_d,
        num_warps=warps(side_q * side_n),
    )
    return out


def distance_gradient(
    own: Tensor, others: Tensor, weights: Tensor, slopes: Tensor, strides: tuple[int, int], scale: float, metric: str,
    out: Tensor,
) -> None:  # fmt: skip
    """Write the gradient of one side to `out`; `strides` are those of weights for a row of `own` and of `others`."""
    tasks, R, D = own.shape
    C = others.shape[1]
    double = accumulator(own.dtype) == torch.float64
    side_r, side_c, side_d = tile(R, 8 if double else 16), tile(C, step(8)), tile(D, 64)
    launch(
        distance_bwd_kernel,
        tasks * blocks(R, side_r) * blocks(D, side_d),
        own,
        others,
        weights,
        slopes,
        out,
        R,
        C,
        D,
        *strides,
        scale,
        METRIC=METRICS.index(metric),
        ACC=triton_accumulator(own.dtype),
        BLOCK_R=side_r,
        BLOCK_C=side_c,
        BLOCK_D=side_d,
        num_warps=warps(side_r * side_d),
    )


def pairwise_distance_bwd(
    grad: Tensor, query: Tensor, prototypes: Tensor, metric: str, needs: int
) -> tuple[Tensor, Tensor]:
    tasks, Q, D = query.shape
    N = prototypes.shape[1]
    weights = slopes = grad
    scale = {"sqeuclidean": 2.0, "dot": -1.0}.get(metric, 1.0)
    if metric in ("euclidean", "cosine"):
        weights = grad.new_empty(grad.shape, dtype=accumulator(grad.dtype))
        slopes = torch.empty_like(weights) if metric == "cosine" else weights
        side_q, side_n, side_d = distance_sides(Q, N, D, query.dtype, metric)
        launch(
            weights_kernel,
            tasks * blocks(Q, side_q) * blocks(N, side_n),
            grad,
            query,
            prototypes,
            weights,
            slopes,
            Q,
            N,
            D,
            METRIC=METRICS.index(metric),
            ACC=triton_accumulator(query.dtype),
            BLOCK_Q=side_q,
            BLOCK_N=side_n,
            BLOCK_D=side_d,
            num_warps=warps(side_q * side_n),
        )
    d_query, d_prototypes = query.new_empty(0), prototypes.new_empty(0)
    if needs & 1:
        d_query = torch.empty_like(query)
        distance_gradient(query, prototypes, weights, slopes, (N, 1), scale, metric, d_query)
    if needs & 2:
        d_prototypes = torch.empty_like(prototypes)
        distance_gradient(prototypes, query, weights, slopes, (1, N), scale, metric, d_prototypes)
    return d_query, d_prototypes


def aot(new):
    """Representative calls, for compilation ahead of time; `new(*shape)` makes a tensor."""
    for metric, T, Q, N, D in (
        ("euclidean", 64, 300, 20, 64),
        ("dot", 64, 300, 20, 64),
        ("manhattan", 3, 7, 5, 17),
    ):
        query, prototypes = new(T, Q, D), new(T, N, D)
        pairwise_distance(query, prototypes, metric)
        pairwise_distance_bwd(new(T, Q, N), query, prototypes, metric, 3)
