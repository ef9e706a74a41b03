"""NT-Xent of embeddings `[T, V, D]`, rows `i` and `i + V / 2` being partners, `-> loss [T]`, and its gradient.

A block of rows goes over all rows with a running softmax, so that nothing of size `[T, V, V]` is written. The gradient
forms the scores again and multiplies each tile of their weights with the rows at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta.kernels._common import (
    accumulator,
    blocks,
    launch,
    multiply_add,
    step,
    tf32,
    tile,
    triton_accumulator,
    warps,
)  # fmt: skip


@triton.jit
def score_tile(
    z, q, n, V, D, scale, ACC: tl.constexpr, TF32: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores of rows `q` against rows `n`, `[BLOCK_Q, BLOCK_N]`; -inf for a row with itself and beyond the last."""
    s = tl.zeros([BLOCK_Q, BLOCK_N], ACC)
    for start in range(0, D, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        a = tl.load(z + q[:, None] * D + k[None, :], mask=(q < V)[:, None] & (k < D)[None, :], other=0)
        b = tl.load(z + n[None, :] * D + k[:, None], mask=(n < V)[None, :] & (k < D)[:, None], other=0)
        s = multiply_add(a.to(ACC), b.to(ACC), s, TF32)
    return tl.where((q[:, None] == n[None, :]) | (n >= V)[None, :], float("-inf"), s * scale)


@triton.jit
def row_losses_kernel(
    embeddings, log_sums, losses, V, D, scale, ACC: tl.constexpr, TF32: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """log_sums, losses `[T, V]`: of every row."""
    program = tl.program_id(0).to(tl.int64)
    q_blocks = tl.cdiv(V, BLOCK_Q)
    task = program // q_blocks
    q = (program % q_blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    z = embeddings + task * V * D
    partner = tl.where(q < V // 2, q + V // 2, q - V // 2)
    most = tl.full([BLOCK_Q], float("-inf"), ACC)
    total = tl.zeros([BLOCK_Q], ACC)
    of_partner = tl.zeros([BLOCK_Q], ACC)
    for start in range(0, V, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        s = score_tile(z, q, n, V, D, scale, ACC, TF32, BLOCK_Q, BLOCK_N, BLOCK_D)
        higher = tl.maximum(most, tl.max(s, 1))
        # -inf as long as a row has met itself alone: then shift by nothing, not by infinity less infinity
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(most - shift) + tl.sum(tl.exp(s - shift[:, None]), 1)
        of_partner += tl.sum(tl.where(n[None, :] == partner[:, None], s, 0.0), 1)
        most = higher
    log_total = tl.log(total)
    tl.store(log_sums + task * V + q, most + log_total, mask=q < V)
    tl.store(losses + task * V + q, (most - of_partner) + log_total, mask=q < V)


@triton.jit
def contrast_gradient_kernel(
    grad, embeddings, log_sums, d_embeddings, V, D, scale, ACC: tl.constexpr, TF32: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """d_embeddings `[T, V, D]`, rows by columns in tiles `[BLOCK_Q, BLOCK_E]`."""
    program = tl.program_id(0).to(tl.int64)
    q_blocks, e_blocks = tl.cdiv(V, BLOCK_Q), tl.cdiv(D, BLOCK_E)
    task = program // (q_blocks * e_blocks)
    rest = program % (q_blocks * e_blocks)
    q = (rest // e_blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    e = (rest % e_blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    z = embeddings + task * V * D
    partner = tl.where(q < V // 2, q + V // 2, q - V // 2)
    own = tl.load(log_sums + task * V + q, mask=q < V, other=0)
    total = tl.zeros([BLOCK_Q, BLOCK_E], ACC)
    for start in range(0, V, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        s = score_tile(z, q, n, V, D, scale, ACC, TF32, BLOCK_Q, BLOCK_N, BLOCK_D)
        other = tl.load(log_sums + task * V + n, mask=n < V, other=0)
        w = tl.exp(s - own[:, None]) + tl.exp(s - other[None, :])
        w -= tl.where(n[None, :] == partner[:, None], 2.0, 0.0)
        rows = tl.load(z + n[:, None] * D + e[None, :], mask=(n < V)[:, None] & (e < D)[None, :], other=0)
        total = multiply_add(w.to(ACC), rows.to(ACC), total, TF32)
    factor = tl.load(grad + task).to(ACC) * scale / V
    at = d_embeddings + task * V * D + q[:, None] * D + e[None, :]
    tl.store(at, (total * factor).to(d_embeddings.dtype.element_ty), mask=(q < V)[:, None] & (e < D)[None, :])


def _sides(embeddings: Tensor) -> dict:
    V, D = embeddings.shape[1:]
    # float64 products are sums of broadcast tiles, which must stay small
    most = 16 if embeddings.dtype == torch.float64 else 64
    return {
        "ACC": triton_accumulator(embeddings.dtype),
        "TF32": tf32(embeddings.dtype),
        "BLOCK_Q": tile(V, most, 16),
        "BLOCK_N": tile(V, most, 16),
        "BLOCK_D": tile(D, step(min(most, 32)), 16),
    }


def _row_losses(embeddings: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    T, V, D = embeddings.shape
    log_sums, losses = (embeddings.new_empty(T, V, dtype=accumulator(embeddings.dtype)) for _ in range(2))
    sides = _sides(embeddings)
    launch(
        row_losses_kernel, T * blocks(V, sides["BLOCK_Q"]), embeddings, log_sums, losses, V, D, 1 / temperature,
        **sides, num_warps=warps(sides["BLOCK_Q"] * sides["BLOCK_N"]),
    )  # fmt: skip
    return log_sums, losses


def contrastive_loss(embeddings: Tensor, temperature: float) -> Tensor:
    return _row_losses(embeddings, temperature)[1].mean(1).to(embeddings.dtype)


def contrastive_loss_bwd(grad: Tensor, embeddings: Tensor, temperature: float, needs: int) -> Tensor:
    if not needs & 1:
        return embeddings.new_empty(0)
    T, V, D = embeddings.shape
    log_sums, _ = _row_losses(embeddings, temperature)
    gradient = torch.empty_like(embeddings)
    # two products share the registers: a narrower tile and twice the warps keep both there
    sides = _sides(embeddings)
    sides["BLOCK_N"] = max(16, sides["BLOCK_N"] // 2)
    columns = tile(D, 16 if embeddings.dtype == torch.float64 else 128, 16)
    launch(
        contrast_gradient_kernel, T * blocks(V, sides["BLOCK_Q"]) * blocks(D, columns), grad, embeddings, log_sums,
        gradient, V, D, 1 / temperature, **sides, BLOCK_E=columns,
        num_warps=2 * warps(sides["BLOCK_Q"] * sides["BLOCK_N"]),
    )  # fmt: skip
    return gradient


def aot(new):
    """Representative calls, for compilation ahead of time; `new(*shape)` makes a tensor."""
    contrastive_loss(new(1, 8192, 128), 0.5)
    contrastive_loss_bwd(new(1), new(1, 8192, 128), 0.5, 1)
