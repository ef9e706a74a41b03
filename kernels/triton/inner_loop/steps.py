"""A task's `K` steps of gradient descent by one program, forward in time; `sweep` goes back.

A *state* is all weights of one moment, layer by layer, each row of a weight with its bias behind it: rows have a one
there, and no code below knows of biases. In the Gram form the first layer is one like the others as well: its input are
the inner products `G`, its weight `U` `[O_1, S]` starts at 0 (minus the coefficients, transposed), and `X` is added to
what it makes of them. Only what a step adds to `U` is not made of `G` but of the identity in its place: the *step
input*.

Everything lies in the program's part of one scratch tensor: states, and the rows of all steps. Where is said by a table
(`table.py`). A program counts its own elements in 32 bits, which `why_not` sees to. All threads wait
(`tl.debug_barrier`) before what some have stored is loaded by others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmeta.kernels._common import activate, activation_bend, activation_slope
from fastmeta.kernels.inner_loop.losses import loss_gradient
from fastmeta.kernels.inner_loop.products import add_product, tile_of
from fastmeta.kernels.inner_loop.structures import Pass, Rates, Targets
from fastmeta.kernels.inner_loop.table import (
    AT,
    BEFORE,
    BEND,
    COLUMNS,
    DELTA,
    INPUT,
    OUT,
    STEP_INPUT,
    SUPPORT,
    WIDTH,
)


@triton.jit
def net(run, base, SIDE: tl.constexpr, HOW: tl.constexpr):
    """Pre-activations of all layers, and the inputs of all but the first. SIDE: SUPPORT or QUERY, whose rows."""
    for layer in range(run.layers):
        line = run.table + layer * WIDTH
        out, columns = tl.load(line + OUT), tl.load(line + COLUMNS)
        weight = run.state + tl.load(line + AT)
        source = run.memory + tl.load(line + (INPUT + SIDE)) + tl.where(layer > 0, run.shift, 0)
        before = run.memory + tl.load(line + (BEFORE + SIDE)) + run.shift
        following = tl.load(line + WIDTH + COLUMNS)  # of the last layer: its outputs
        value = run.memory + tl.load(line + (WIDTH + INPUT + SIDE)) + run.shift
        for first in range(0, run.rows, HOW.BLOCK_R):
            for start in range(0, following, HOW.BLOCK_W):
                tile = tile_of(first, start, run.rows, out, HOW.BLOCK_R, HOW.BLOCK_W)
                z = tl.full([HOW.BLOCK_R, HOW.BLOCK_W], 0, HOW.ACC)
                z = add_product(z, source, columns, weight, columns, tile, columns, HOW, B_TRANSPOSED=True)
                if HOW.GIVEN:
                    z += tl.load(base + tile.at, mask=tile.mask & (layer == 0), other=0)
                tl.store(before + tile.at, z, mask=tile.mask)
                if layer + 1 < run.layers:
                    # behind the last column the one that biases are multiplied by
                    h = tl.where(tile.n_mask, activate(z, HOW.ACTIVATION), 1.0)
                    at = tile.m[:, None] * following + tile.n[None, :]
                    tl.store(value + at, h, mask=tile.m_mask & (tile.n < following)[None, :])
        tl.debug_barrier()


@triton.jit
def deltas(run, SIDE: tl.constexpr, HOW: tl.constexpr):
    """Deltas of all hidden layers from those of the last; of support rows also what they get of a tangent there."""
    for up in range(1, run.layers):
        line = run.table + (run.layers - up) * WIDTH
        below = line - WIDTH
        out, columns, width = tl.load(line + OUT), tl.load(line + COLUMNS), tl.load(below + OUT)
        weight = run.state + tl.load(line + AT)
        above = run.memory + tl.load(line + (DELTA + SIDE)) + run.shift
        before = run.memory + tl.load(below + (BEFORE + SIDE)) + run.shift
        delta = run.memory + tl.load(below + (DELTA + SIDE)) + run.shift
        for first in range(0, run.rows, HOW.BLOCK_R):
            for start in range(0, width, HOW.BLOCK_W):
                tile = tile_of(first, start, run.rows, width, HOW.BLOCK_R, HOW.BLOCK_W)
                d = tl.full([HOW.BLOCK_R, HOW.BLOCK_W], 0, HOW.ACC)
                d = add_product(d, above, out, weight, columns, tile, out, HOW)
                z = tl.load(before + tile.at, mask=tile.mask, other=0)
                tl.store(delta + tile.at, d * activation_slope(z, HOW.ACTIVATION), mask=tile.mask)
                if HOW.BENT and SIDE == SUPPORT:
                    bend = run.memory + tl.load(below + BEND) + run.shift
                    tl.store(bend + tile.at, d * activation_bend(z, HOW.ACTIVATION), mask=tile.mask)
        tl.debug_barrier()


@triton.jit
def update(run, next_state, moment, next_moment, rates, numbers, is_first, HOW: tl.constexpr):
    """W' = W - rate * M', M' = momentum * M + gradient + decay * W; rates: those of this step."""
    momentum, decay = tl.load(numbers), tl.load(numbers + 1)
    for layer in range(run.layers):
        line = run.table + layer * WIDTH
        out, columns, begin = tl.load(line + OUT), tl.load(line + COLUMNS), tl.load(line + AT)
        rate = tl.load(rates.layers + layer)
        source = run.memory + tl.load(line + STEP_INPUT) + tl.where(layer > 0, run.shift, 0)
        delta = run.memory + tl.load(line + DELTA) + run.shift
        for first in range(0, out, HOW.BLOCK_W):
            for start in range(0, columns, HOW.BLOCK_W):
                tile = tile_of(first, start, out, columns, HOW.BLOCK_W, HOW.BLOCK_W)
                g = tl.full([HOW.BLOCK_W, HOW.BLOCK_W], 0, HOW.ACC)
                g = add_product(g, delta, out, source, columns, tile, run.rows, HOW, A_TRANSPOSED=True)
                at = begin + tile.at
                w = tl.load(run.state + at, mask=tile.mask, other=0)
                if HOW.DECAY:
                    g += decay * w
                if HOW.MOMENTUM:
                    g += momentum * tl.load(moment + at, mask=tile.mask & (is_first == 0), other=0)
                if HOW.MOMENTUM or HOW.WANTS_RATES:
                    tl.store(next_moment + at, g, mask=tile.mask)
                if HOW.ELEMENTWISE:
                    g *= tl.load(rates.elements + at, mask=tile.mask, other=0)
                tl.store(next_state + at, w - rate * g, mask=tile.mask)
    tl.debug_barrier()


@triton.jit
def adapt(memory, rows, rates, problem, HOW: tl.constexpr):
    """All steps from the first of the states.

    HOW.SWEEPS: each step leaves its rows, `record` elements, and a state of its own. HOW.WANTS_RATES: and what its
    update was made of.
    """
    table, numbers, sizes, places = problem.table, problem.numbers, problem.sizes, problem.places
    last = table + (sizes.layers - 1) * WIDTH
    targets = Targets(rows.target, rows.weight, tl.load(numbers + 2), sizes.support, tl.load(last + OUT))
    for k in range(sizes.steps):
        kept, kept_moments = k if HOW.SWEEPS else 0, k if HOW.WANTS_RATES else 0
        state = memory + places.states + kept * places.state
        next_state = state + places.state if HOW.SWEEPS else state
        next_moment = memory + places.moments + kept_moments * places.state
        moment = next_moment - places.state if HOW.WANTS_RATES else next_moment
        run = Pass(memory, table, sizes.layers, sizes.support, state, kept * places.record)
        net(run, rows.base, SUPPORT, HOW)
        logits = memory + tl.load(last + BEFORE) + run.shift
        loss_gradient(logits, memory + tl.load(last + DELTA) + run.shift, targets, 1.0, rows.base, False, HOW)
        tl.debug_barrier()
        deltas(run, SUPPORT, HOW)
        of_step = Rates(rates.layers + k * sizes.layers, rates.elements)
        update(run, next_state, moment, next_moment, of_step, numbers, k == 0, HOW)
