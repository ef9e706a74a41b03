"""A task's query rows: the loss at the adapted weights, and the way back from there."""

from __future__ import annotations

import triton
import triton.language as tl

from fastmeta.kernels.inner_loop.losses import loss_gradient, task_loss
from fastmeta.kernels.inner_loop.products import add_product, add_state, copy_rows, copy_state, tile_of
from fastmeta.kernels.inner_loop.steps import deltas, net
from fastmeta.kernels.inner_loop.structures import Pass, Targets
from fastmeta.kernels.inner_loop.table import AT, BEFORE, COLUMNS, DELTA, INPUT, OUT, QUERY, WIDTH
from fastmeta.kernels.inner_loop.tangents import add_input_gradient
from fastmeta.kernels.inner_loop.task import rows_of


@triton.jit
def targets_of(rows, problem):
    last = problem.table + (problem.sizes.layers - 1) * WIDTH
    return Targets(rows.target, rows.weight, tl.load(problem.numbers + 2), problem.sizes.queries, tl.load(last + OUT))


@triton.jit
def query_net(task, memory, state, query, problem, HOW: tl.constexpr):
    """The net `state` on the task's query rows: returns the pass, and what its logits are judged by."""
    sizes, table = problem.sizes, problem.table
    rows = rows_of(task, query, sizes.queries, problem, HOW)
    to = memory + tl.load(table + (INPUT + QUERY))
    copy_rows(rows.input, to, sizes.queries, sizes.width, tl.load(table + COLUMNS), HOW)
    tl.debug_barrier()
    run = Pass(memory, table, sizes.layers, sizes.queries, state, 0)
    net(run, rows.base, QUERY, HOW)
    return run, targets_of(rows, problem)


@triton.jit
def query_loss(task, run, targets, losses, logits, HOW: tl.constexpr):
    """The task's loss, and its logits `[Q, C]`."""
    found = run.memory + tl.load(run.table + (run.layers - 1) * WIDTH + (BEFORE + QUERY))
    tl.store(losses + task, task_loss(found, targets, HOW))
    count = targets.rows * targets.outputs
    copy_state(found, logits + task * count, count, HOW)


@triton.jit
def weight_gradients(run, to, HOW: tl.constexpr):
    """to: the gradient of the state, from the query rows' inputs and deltas."""
    for layer in range(run.layers):
        line = run.table + layer * WIDTH
        out, columns, begin = tl.load(line + OUT), tl.load(line + COLUMNS), tl.load(line + AT)
        source = run.memory + tl.load(line + (INPUT + QUERY))
        delta = run.memory + tl.load(line + (DELTA + QUERY))
        for first in range(0, out, HOW.BLOCK_W):
            for start in range(0, columns, HOW.BLOCK_W):
                tile = tile_of(first, start, out, columns, HOW.BLOCK_W, HOW.BLOCK_W)
                g = tl.full([HOW.BLOCK_W, HOW.BLOCK_W], 0, HOW.ACC)
                g = add_product(g, delta, out, source, columns, tile, run.rows, HOW, A_TRANSPOSED=True)
                tl.store(to + begin + tile.at, g, mask=tile.mask)


@triton.jit
def query_backward(task, run, targets, grad_losses, grad_logits, d_query, problem, HOW: tl.constexpr):
    """The adjoint of the adapted state, and the gradients of the query rows."""
    sizes, memory, table = problem.sizes, run.memory, run.table
    last = table + (sizes.layers - 1) * WIDTH
    logits, delta = memory + tl.load(last + (BEFORE + QUERY)), memory + tl.load(last + (DELTA + QUERY))
    extra = grad_logits + task * (targets.rows * targets.outputs)
    loss_gradient(logits, delta, targets, tl.load(grad_losses + task), extra, True, HOW)
    tl.debug_barrier()
    deltas(run, QUERY, HOW)
    weight_gradients(run, memory + problem.places.adjoint, HOW)
    delta = memory + tl.load(table + (DELTA + QUERY))
    if HOW.WANTS_QUERY_INPUT:
        d_input = d_query.input + task * (sizes.queries * sizes.width)
        add_input_gradient(d_input, delta, delta, run.state, run, sizes.width, False, HOW)
    if HOW.WANTS_QUERY_BASE:
        d_base = d_query.base + task * (sizes.queries * sizes.first)
        add_state(delta, d_base, sizes.queries * tl.load(table + OUT), HOW)
    tl.debug_barrier()
