"""Class means `[T, S, D] -> [T, N, D]` and their gradient; an absent class gives zeros."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta.kernels._common import blocks, launch, step, tile, triton_accumulator, warps


@triton.jit
def prototypes_kernel(
    embeddings,
    labels,
    out,
    S,
    N,
    D,
    ACC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    d_blocks, n_blocks = tl.cdiv(D, BLOCK_D), tl.cdiv(N, BLOCK_N)
    d = (program % d_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = (program // d_blocks % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    task = program // d_blocks // n_blocks
    total = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    count = tl.zeros([BLOCK_N], ACC)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        label = tl.load(labels + task * S + s, mask=s < S, other=-1)
        row = tl.load(
            embeddings + (task * S + s)[:, None] * D + d[None, :],
            mask=(s < S)[:, None] & (d < D)[None, :],
            other=0,
        ).to(ACC)
        member = label[:, None] == n[None, :]
        # selected, not multiplied by 0 or 1: an infinity stays with its own class
        total += tl.sum(tl.where(member[:, :, None], row[:, None, :], 0.0), 0)
        count += tl.sum(member.to(ACC), 0)
    mean = total / tl.maximum(count, 1.0)[:, None]
    tl.store(
        out + (task * N + n)[:, None] * D + d[None, :],
        mean.to(out.dtype.element_ty),
        mask=(n < N)[:, None] & (d < D)[None, :],
    )


@triton.jit
def prototypes_bwd_kernel(
    grad,
    labels,
    out,
    S,
    N,
    D,
    ACC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    d_blocks, s_blocks = tl.cdiv(D, BLOCK_D), tl.cdiv(S, BLOCK_S)
    d = (program % d_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    s = (program // d_blocks % s_blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    task = program // d_blocks // s_blocks
    label = tl.load(labels + task * S + s, mask=s < S, other=-1)
    count = tl.zeros([BLOCK_S], tl.int32)
    for start in range(0, S, BLOCK_S):
        other = start + tl.arange(0, BLOCK_S)
        other_label = tl.load(labels + task * S + other, mask=other < S, other=-2)
        count += tl.sum((label[:, None] == other_label[None, :]).to(tl.int32), 1)
    known = (label >= 0) & (label < N)
    value = tl.load(
        grad + (task * N + label)[:, None] * D + d[None, :], mask=known[:, None] & (d < D)[None, :], other=0
    ).to(ACC)
    value = value / tl.maximum(count, 1).to(ACC)[:, None]
    tl.store(
        out + (task * S + s)[:, None] * D + d[None, :],
        value.to(out.dtype.element_ty),
        mask=(s < S)[:, None] & (d < D)[None, :],
    )


def means(embeddings: Tensor, labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """`class_prototypes` in `dtype`."""
    tasks, S, D = embeddings.shape
    out = embeddings.new_empty(tasks, num_classes, D, dtype=dtype)
    side_s, side_n, side_d = tile(S, step(8)), tile(num_classes, 16), tile(D, 64)
    if embeddings.dtype == torch.float64:
        side_d = min(side_d, 32)
    launch(
        prototypes_kernel,
        tasks * blocks(num_classes, side_n) * blocks(D, side_d),
        embeddings,
        labels,
        out,
        S,
        num_classes,
        D,
        ACC=triton_accumulator(embeddings.dtype),
        BLOCK_S=side_s,
        BLOCK_N=side_n,
        BLOCK_D=side_d,
        num_warps=warps(side_n * side_d),
    )
    return out


def class_prototypes(embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    return means(embeddings, labels, num_classes, embeddings.dtype)


def scatter(grad: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """`class_prototypes_bwd` in `dtype`."""
    tasks, N, D = grad.shape
    S = labels.shape[1]
    out = grad.new_empty(tasks, S, D, dtype=dtype)
    side_s, side_d = tile(S, 16), tile(D, 64)
    launch(
        prototypes_bwd_kernel,
        tasks * blocks(S, side_s) * blocks(D, side_d),
        grad,
        labels,
        out,
        S,
        N,
        D,
        ACC=triton_accumulator(grad.dtype),
        BLOCK_S=side_s,
        BLOCK_D=side_d,
        num_warps=warps(side_s * side_d),
    )
    return out


def class_prototypes_bwd(grad: Tensor, labels: Tensor) -> Tensor:
    return scatter(grad, labels, grad.dtype)


def aot(new):
    """Representative calls, for compilation ahead of time; `new(*shape)` makes a tensor."""
    for T, S, N, D in ((16, 100, 20, 1600), (3, 7, 10, 17)):
        labels = new(T, S, dtype=torch.int64)
        class_prototypes(new(T, S, D), labels, N)
        class_prototypes_bwd(new(T, N, D), labels)
