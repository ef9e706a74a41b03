"""The loss of a Prototypical Network from embeddings, `-> loss [T], accuracy [T]`, and its gradient.

Forward: the prototypes, then one pass over the queries with a running softmax over blocks of classes, so that nothing
of size `[T, Q, N]` is written. The gradient forms the distances again; the weights of its sums are `[Q, N]` per task
and live in a scratch buffer for a few tasks at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta.kernels._common import METRICS, accumulator, blocks, launch, tile, triton_accumulator, warps
from fastmeta.kernels._distance import distance_tile
from fastmeta.kernels.class_prototypes import means, scatter
from fastmeta.kernels.pairwise_distance import distance_gradient, distance_sides, pair_weights

ENOUGH_PROGRAMS = 264  # two on each multiprocessor of a large GPU: below, a task's queries are split among programs
SCRATCH_BYTES = 64 << 20  # of the gradient's weights; at least one task's


@triton.jit
def softmax_row(
    query, prototypes, q, label, Q, N, D, METRIC: tl.constexpr, ACC: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of the distances of rows `q`: the smallest, where it is first (-1 where one is NaN), sum of exp(smallest - d),
    the label's."""
    smallest = tl.full([BLOCK_Q], float("inf"), ACC)
    nearest = tl.zeros([BLOCK_Q], tl.int64)
    total = tl.zeros([BLOCK_Q], ACC)
    of_label = tl.zeros([BLOCK_Q], ACC)
    unordered = tl.zeros([BLOCK_Q], tl.int32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        d = distance_tile(query, prototypes, q, n, Q, N, D, METRIC, ACC, BLOCK_Q, BLOCK_N, BLOCK_D)
        d = tl.where((n < N)[None, :], d, float("inf"))
        unordered += tl.sum((d != d).to(tl.int32), 1)
        here = tl.min(d, 1)
        first = tl.min(tl.where(d == here[:, None], n[None, :], N), 1)
        nearest = tl.where(here < smallest, first, nearest)
        lower = tl.minimum(smallest, here)
        # infinite as long as all distances are: then shift by nothing, not by infinity less infinity
        shift = tl.where(lower == float("inf"), 0.0, lower)
        total = total * tl.exp(shift - smallest) + tl.sum(tl.exp(shift[:, None] - d), 1)
        of_label += tl.sum(tl.where(n[None, :] == label[:, None], d, 0.0), 1)
        smallest = lower
    return smallest, tl.where(unordered > 0, -1, nearest), total, of_label


@triton.jit
def loss_kernel(
    query,
    prototypes,
    labels,
    loss,
    accuracy,
    Q,
    N,
    D,
    parts,
    blocks_per_part,
    divisor,
    METRIC: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """loss, accuracy `[T, parts]`: sums over the queries of a part, over `divisor`."""
    program = tl.program_id(0).to(tl.int64)
    task, part = program // parts, program % parts
    query += task * Q * D
    prototypes += task * N * D
    losses = tl.zeros([BLOCK_Q], ACC)
    hits = tl.zeros([BLOCK_Q], ACC)
    for block in range(0, blocks_per_part):
        q = (part * blocks_per_part + block) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        label = tl.load(labels + task * Q + q, mask=q < Q, other=-1)
        smallest, nearest, total, of_label = softmax_row(
            query, prototypes, q, label, Q, N, D, METRIC, ACC, BLOCK_Q, BLOCK_N, BLOCK_D
        )
        known = (label >= 0) & (label < N)
        # large distances cancel exactly before the logarithm, which may be small, is added
        losses += tl.where(known, (of_label - smallest) + tl.log(total), 0.0)
        hits += (known & (nearest == label)).to(ACC)
    tl.store(loss + program, (tl.sum(losses, 0) / divisor).to(loss.dtype.element_ty))
    tl.store(accuracy + program, (tl.sum(hits, 0) / divisor).to(accuracy.dtype.element_ty))


@triton.jit
def mean_kernel(loss_parts, accuracy_parts, loss, accuracy, parts, divisor, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """loss, accuracy `[T]` from their sums `[T, parts]`."""
    task = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    mask = part < parts
    losses = tl.sum(tl.load(loss_parts + task * parts + part, mask=mask, other=0), 0)
    hits = tl.sum(tl.load(accuracy_parts + task * parts + part, mask=mask, other=0), 0)
    tl.store(loss + task, (losses / divisor).to(loss.dtype.element_ty))
    tl.store(accuracy + task, (hits / divisor).to(accuracy.dtype.element_ty))


@triton.jit
def loss_weights_kernel(
    grad_loss,
    query,
    prototypes,
    labels,
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
    """weights and (cosine) slopes `[T, Q, N]` as in pairwise_distance.py, for the distances' gradient in the loss."""
    program = tl.program_id(0).to(tl.int64)
    q_blocks = tl.cdiv(Q, BLOCK_Q)
    task = program // q_blocks
    q = (program % q_blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query += task * Q * D
    prototypes += task * N * D
    label = tl.load(labels + task * Q + q, mask=q < Q, other=-1)
    known = (label >= 0) & (label < N)
    outer = tl.load(grad_loss + task).to(ACC) / Q
    smallest, nearest, total, of_label = softmax_row(
        query, prototypes, q, label, Q, N, D, METRIC, ACC, BLOCK_Q, BLOCK_N, BLOCK_D
    )
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        d = distance_tile(query, prototypes, q, n, Q, N, D, METRIC, ACC, BLOCK_Q, BLOCK_N, BLOCK_D)
        softmax = tl.exp(smallest[:, None] - d) / total[:, None]
        g = tl.where(known[:, None], outer * ((n[None, :] == label[:, None]).to(ACC) - softmax), 0.0)
        w, v = pair_weights(g, d, query, prototypes, q, n, Q, N, D, METRIC, ACC, BLOCK_Q, BLOCK_N, BLOCK_D)
        at = (task * Q + q)[:, None] * N + n[None, :]
        mask = (q < Q)[:, None] & (n < N)[None, :]
        tl.store(weights + at, w, mask=mask)
        if METRIC == 2:
            tl.store(slopes + at, v, mask=mask)


def prototypical_loss(
    support: Tensor, support_labels: Tensor, query: Tensor, query_labels: Tensor, num_classes: int, metric: str
) -> tuple[Tensor, Tensor]:
    tasks, Q, D = query.shape
    if Q == 0:
        return query.new_full((tasks,), float("nan")), query.new_full((tasks,), float("nan"))
    scratch = accumulator(query.dtype)
    prototypes = means(support, support_labels, num_classes, scratch)
    side_q, side_n, side_d = distance_sides(Q, num_classes, D, query.dtype, metric)
    q_blocks = blocks(Q, side_q)
    parts = 1 if tasks >= ENOUGH_PROGRAMS else min(q_blocks, blocks(ENOUGH_PROGRAMS, max(tasks, 1)))
    blocks_per_part = blocks(q_blocks, parts)
    parts = blocks(q_blocks, blocks_per_part)
    loss, accuracy = query.new_empty(tasks), query.new_empty(tasks)
    sums = [loss, accuracy] if parts == 1 else [query.new_empty(tasks, parts, dtype=scratch) for _ in range(2)]
    launch(
        loss_kernel,
        tasks * parts,
        query,
        prototypes,
        query_labels,
        *sums,
        Q,
        num_classes,
        D,
        parts,
        blocks_per_part,
        float(Q) if parts == 1 else 1.0,
        METRIC=METRICS.index(metric),
        ACC=triton_accumulator(query.dtype),
        BLOCK_Q=side_q,
        BLOCK_N=side_n,
        BLOCK_D=side_d,
        num_warps=warps(side_q * side_n),
    )
    if parts > 1:
        launch(
            mean_kernel,
            tasks,
            *sums,
            loss,
            accuracy,
            parts,
            float(Q),
            ACC=triton_accumulator(query.dtype),
            BLOCK=tile(parts, ENOUGH_PROGRAMS * 2),
            num_warps=1,
        )
    return loss, accuracy


def prototypical_loss_bwd(
    grad_loss: Tensor,
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    num_classes: int,
    metric: str,
    needs: int,
) -> tuple[Tensor, Tensor]:
    tasks, Q, D = query.shape
    scratch = accumulator(query.dtype)
    prototypes = means(support, support_labels, num_classes, scratch)
    d_query = torch.empty_like(query) if needs & 2 else query.new_empty(0)
    d_prototypes = torch.empty_like(prototypes) if needs & 1 else None
    side_q, side_n, side_d = distance_sides(Q, num_classes, D, query.dtype, metric)
    at_once = max(1, SCRATCH_BYTES // max(1, Q * num_classes * prototypes.element_size()))
    for start in range(0, tasks, at_once):
        part = slice(start, start + at_once)
        few = min(at_once, tasks - start)
        weights = query.new_empty(few, Q, num_classes, dtype=scratch)
        slopes = torch.empty_like(weights) if metric == "cosine" else weights
        launch(
            loss_weights_kernel,
            few * blocks(Q, side_q),
            grad_loss[part],
            query[part],
            prototypes[part],
            query_labels[part],
            weights,
            slopes,
            Q,
            num_classes,
            D,
            METRIC=METRICS.index(metric),
            ACC=triton_accumulator(query.dtype),
            BLOCK_Q=side_q,
            BLOCK_N=side_n,
            BLOCK_D=side_d,
            num_warps=warps(side_q * side_n),
        )
        sides = query[part], prototypes[part]
        if needs & 2:
            distance_gradient(*sides, weights, slopes, (num_classes, 1), 1.0, metric, d_query[part])
        if d_prototypes is not None:
            distance_gradient(*sides[::-1], weights, slopes, (1, num_classes), 1.0, metric, d_prototypes[part])
    if d_prototypes is None:
        return support.new_empty(0), d_query
    return scatter(d_prototypes, support_labels, support.dtype), d_query


def aot(new):
    """Representative calls, for compilation ahead of time; `new(*shape)` makes a tensor."""
    for metric, T, S, Q, N, D in (
        ("sqeuclidean", 64, 100, 300, 20, 64),
        ("cosine", 64, 100, 300, 20, 64),
    ):
        support, query = (new(T, S, D), new(T, S, dtype=torch.int64)), (new(T, Q, D), new(T, Q, dtype=torch.int64))
        prototypical_loss(*support, *query, N, metric)
        prototypical_loss_bwd(new(T), *support, *query, N, metric, 3)
