"""Tangents of a step's activations and deltas in a direction of its weights, and what they are wanted for: products
with the Hessian of the step's loss (Pearlmutter 1994). `docs/inner-loops.md` derives them."""

from __future__ import annotations

import triton
import triton.language as tl

from fastmeta.kernels._common import activation_slope
from fastmeta.kernels.inner_loop.products import add_product, tile_of
from fastmeta.kernels.inner_loop.table import (
    AT,
    BEFORE,
    BEND,
    COLUMNS,
    DELTA,
    DOT,
    DOT_INPUT,
    INPUT,
    OUT,
    STEP_INPUT,
    WIDTH,
)


@triton.jit
def net_tangents(run, direction, HOW: tl.constexpr):
    """Tangents of all inputs but the first, and of the logits; BENT: in place of other layers' what deltas get."""
    for layer in range(run.layers):
        line = run.table + layer * WIDTH
        out, columns, begin = tl.load(line + OUT), tl.load(line + COLUMNS), tl.load(line + AT)
        source = run.memory + tl.load(line + STEP_INPUT) + tl.where(layer > 0, run.shift, 0)
        dot_source = run.memory + tl.load(line + DOT_INPUT)
        inner = tl.where(layer > 0, columns, 0)  # the first layer's input has no tangent
        before = run.memory + tl.load(line + BEFORE) + run.shift
        dot = run.memory + tl.load(line + DOT)
        following = tl.load(line + WIDTH + COLUMNS)
        dot_value = run.memory + tl.load(line + WIDTH + DOT_INPUT)
        w, d = run.state + begin, direction + begin
        for first in range(0, run.rows, HOW.BLOCK_R):
            for start in range(0, following, HOW.BLOCK_W):
                tile = tile_of(first, start, run.rows, out, HOW.BLOCK_R, HOW.BLOCK_W)
                z_dot = tl.full([HOW.BLOCK_R, HOW.BLOCK_W], 0, HOW.ACC)
                z_dot = add_product(z_dot, dot_source, columns, w, columns, tile, inner, HOW, B_TRANSPOSED=True)
                z_dot = add_product(z_dot, source, columns, d, columns, tile, columns, HOW, B_TRANSPOSED=True)
                if layer + 1 < run.layers:
                    if HOW.BENT:
                        bend = tl.load(run.memory + tl.load(line + BEND) + run.shift + tile.at, mask=tile.mask, other=0)
                        tl.store(dot + tile.at, bend * z_dot, mask=tile.mask)
                    z = tl.load(before + tile.at, mask=tile.mask, other=0)
                    h_dot = tl.where(tile.mask, z_dot * activation_slope(z, HOW.ACTIVATION), 0.0)
                    at = tile.m[:, None] * following + tile.n[None, :]
                    tl.store(dot_value + at, h_dot, mask=tile.m_mask & (tile.n < following)[None, :])
                else:
                    tl.store(dot + tile.at, z_dot, mask=tile.mask)
        tl.debug_barrier()


@triton.jit
def delta_tangents(run, direction, HOW: tl.constexpr):
    """Tangents of the deltas of all hidden layers from those of the last."""
    for up in range(1, run.layers):
        line = run.table + (run.layers - up) * WIDTH
        below = line - WIDTH
        out, columns, width = tl.load(line + OUT), tl.load(line + COLUMNS), tl.load(below + OUT)
        begin = tl.load(line + AT)
        above = run.memory + tl.load(line + DELTA) + run.shift
        dot_above = run.memory + tl.load(line + DOT)
        before = run.memory + tl.load(below + BEFORE) + run.shift
        dot = run.memory + tl.load(below + DOT)
        w, d = run.state + begin, direction + begin
        for first in range(0, run.rows, HOW.BLOCK_R):
            for start in range(0, width, HOW.BLOCK_W):
                tile = tile_of(first, start, run.rows, width, HOW.BLOCK_R, HOW.BLOCK_W)
                total = tl.full([HOW.BLOCK_R, HOW.BLOCK_W], 0, HOW.ACC)
                total = add_product(total, dot_above, out, w, columns, tile, out, HOW)
                total = add_product(total, above, out, d, columns, tile, out, HOW)
                total *= activation_slope(tl.load(before + tile.at, mask=tile.mask, other=0), HOW.ACTIVATION)
                if HOW.BENT:
                    total += tl.load(dot + tile.at, mask=tile.mask, other=0)
                tl.store(dot + tile.at, total, mask=tile.mask)
        tl.debug_barrier()


@triton.jit
def add_hessian_product(run, adjoint, HOW: tl.constexpr):
    """adjoint += D'^T A + D^T A', layer by layer (' is the tangent)."""
    for layer in range(run.layers):
        line = run.table + layer * WIDTH
        out, columns, begin = tl.load(line + OUT), tl.load(line + COLUMNS), tl.load(line + AT)
        source = run.memory + tl.load(line + INPUT) + tl.where(layer > 0, run.shift, 0)
        dot_source = run.memory + tl.load(line + DOT_INPUT)
        inner = tl.where(layer > 0, run.rows, 0)
        delta = run.memory + tl.load(line + DELTA) + run.shift
        dot = run.memory + tl.load(line + DOT)
        for first in range(0, out, HOW.BLOCK_W):
            for start in range(0, columns, HOW.BLOCK_W):
                tile = tile_of(first, start, out, columns, HOW.BLOCK_W, HOW.BLOCK_W)
                total = tl.full([HOW.BLOCK_W, HOW.BLOCK_W], 0, HOW.ACC)
                total = add_product(total, dot, out, source, columns, tile, run.rows, HOW, A_TRANSPOSED=True)
                total = add_product(total, delta, out, dot_source, columns, tile, inner, HOW, A_TRANSPOSED=True)
                at = adjoint + begin + tile.at
                tl.store(at, total + tl.load(at, mask=tile.mask, other=0), mask=tile.mask)


@triton.jit
def add_input_gradient(out, dot, delta, direction, run, width, THROUGH_STEP: tl.constexpr, HOW: tl.constexpr):
    """out `[rows, width]` += dot W, of the first layer. THROUGH_STEP: plus delta R, where its input made the step."""
    columns, outputs = tl.load(run.table + COLUMNS), tl.load(run.table + OUT)
    for first in range(0, run.rows, HOW.BLOCK_R):
        for start in range(0, width, HOW.BLOCK_W):
            tile = tile_of(first, start, run.rows, width, HOW.BLOCK_R, HOW.BLOCK_W)
            total = tl.full([HOW.BLOCK_R, HOW.BLOCK_W], 0, HOW.ACC)
            total = add_product(total, dot, outputs, run.state, columns, tile, outputs, HOW)
            if THROUGH_STEP:
                total = add_product(total, delta, outputs, direction, columns, tile, outputs, HOW)
            tl.store(out + tile.at, total + tl.load(out + tile.at, mask=tile.mask, other=0), mask=tile.mask)
