"""A task's query rows: the loss at the adapted weights, and the way back from there."""

from __future__ import annotations

import triton
import triton.language as tl

from fastmeta.kernels.inner_loop.losses import loss_gradient, task_loss
from fastmeta.kernels.inner_loop.products import add_product, add_state, copy_rows, copy_state
from fastmeta.kernels.inner_loop.steps import AT, BEFORE, COLUMNS, DELTA, INPUT, OUT, QUERY, WIDTH, deltas, net
from fastmeta.kernels.inner_loop.sweep import add_input_gradient


@triton.jit
def query_net(
    memory,
    state,
    table,
    rows,
    base,
    sizes,
    GIVEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """The adapted net `state` on the query rows."""
    T, S, Q, K, L, IN, FIRST = sizes
    copy_rows(rows, memory + tl.load(table + (INPUT + QUERY)), Q, IN, tl.load(table + COLUMNS), BLOCK_R, BLOCK_W)
    tl.debug_barrier()
    net(memory, table, state, base, Q, 0, L, QUERY, GIVEN, ACTIVATION, PRECISION, ACC, BLOCK_R, BLOCK_W)


@triton.jit
def query_forward(
    task,
    memory,
    table,
    numbers,
    target,
    row_weight,
    losses,
    logits,
    sizes,
    LOSS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """After `query_net`: the task's loss, and its logits `[Q, C]`."""
    T, S, Q, K, L, IN, FIRST = sizes
    last = table + (L - 1) * WIDTH
    C = tl.load(last + OUT)
    found = memory + tl.load(last + (BEFORE + QUERY))
    bends_at = tl.load(numbers + 2)
    tl.store(losses + task, task_loss(found, target, row_weight, bends_at, Q, C, LOSS, ACC, BLOCK_R, BLOCK_W))
    copy_state(found, logits + task * (Q * C), Q * C, BLOCK_P)


@triton.jit
def query_backward(
    task,
    memory,
    state,
    adjoint,
    table,
    numbers,
    target,
    row_weight,
    grad_losses,
    grad_logits,
    d_query,
    sizes,
    LOSS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WANTS_INPUT: tl.constexpr,
    WANTS_BASE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """After `query_net`: the adjoint of the adapted state, and the gradients of the query rows."""
    T, S, Q, K, L, IN, FIRST = sizes
    d_input, d_base = d_query
    last = table + (L - 1) * WIDTH
    C = tl.load(last + OUT)
    loss_gradient(
        memory + tl.load(last + (BEFORE + QUERY)),
        memory + tl.load(last + (DELTA + QUERY)),
        target,
        row_weight,
        tl.load(grad_losses + task),
        grad_logits + task * (Q * C),
        tl.load(numbers + 2),
        Q,
        C,
        LOSS,
        True,
        ACC,
        BLOCK_R,
        BLOCK_W,
    )
    tl.debug_barrier()
    deltas(memory, table, state, Q, 0, L, QUERY, False, ACTIVATION, PRECISION, ACC, BLOCK_R, BLOCK_W)
    for layer in range(L):
        line = table + layer * WIDTH
        out, columns = tl.load(line + OUT), tl.load(line + COLUMNS)
        to = adjoint + tl.load(line + AT)
        source = memory + tl.load(line + (INPUT + QUERY))
        delta = memory + tl.load(line + (DELTA + QUERY))
        for first in range(0, out, BLOCK_W):
            o = first + tl.arange(0, BLOCK_W)
            o_mask = (o < out)[:, None]
            for start in range(0, columns, BLOCK_W):
                c = start + tl.arange(0, BLOCK_W)
                g = tl.full([BLOCK_W, BLOCK_W], 0, ACC)
                c_mask = (c < columns)[None, :]
                g = add_product(
                    g, delta, out, source, columns, o, c, o_mask, c_mask, Q, True, False, PRECISION, BLOCK_R
                )
                tl.store(to + (o[:, None] * columns + c[None, :]), g, mask=o_mask & c_mask)
    delta = memory + tl.load(table + (DELTA + QUERY))
    columns, out = tl.load(table + COLUMNS), tl.load(table + OUT)
    if WANTS_INPUT:
        add_input_gradient(
            d_input + task * (Q * IN),
            delta,
            state,
            delta,
            state,
            Q,
            IN,
            columns,
            out,
            False,
            PRECISION,
            ACC,
            BLOCK_R,
            BLOCK_W,
        )
    if WANTS_BASE:
        add_state(delta, d_base + task * (Q * FIRST), Q * out, BLOCK_P)
    tl.debug_barrier()
