"""The way back through a task's steps: a product with the Hessian of each step's loss, by tangents of all activations
and deltas in the adjoint's direction (Pearlmutter 1994). `docs/inner-loops.md` derives it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmeta.kernels._common import activation_slope
from fastmeta.kernels.inner_loop.losses import times_curvature
from fastmeta.kernels.inner_loop.products import add_product, add_state
from fastmeta.kernels.inner_loop.steps import (
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
def take_direction(
    adjoint,
    direction,
    moment_adjoint,
    moment,
    table,
    rates,
    element_rates,
    d_rates,
    d_element_rates,
    momentum,
    decay,
    is_last,
    L,
    MOMENTUM: tl.constexpr,
    DECAY: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
    WANTS_RATES: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """R = U - rate * V, V += decay * R, U = momentum * R, for the adjoints V of the state and U of the moments; and
    what the step's rates get, `-V * moment`."""
    for layer in range(L):
        line = table + layer * WIDTH
        begin = tl.load(line + AT)
        end = begin + tl.load(line + OUT) * tl.load(line + COLUMNS)
        rate = tl.load(rates + layer)
        total = tl.full([BLOCK_P], 0, ACC)
        for start in range(begin, end, BLOCK_P):
            i = start + tl.arange(0, BLOCK_P)
            mask = i < end
            v = tl.load(adjoint + i, mask=mask, other=0)
            if WANTS_RATES:
                product = v * tl.load(moment + i, mask=mask, other=0)
            r = -rate * v
            if ELEMENTWISE:
                own = tl.load(element_rates + i, mask=mask, other=0)
                r *= own
                if WANTS_RATES:
                    before = tl.load(d_element_rates + i, mask=mask, other=0)
                    tl.store(d_element_rates + i, before - rate * product, mask=mask)
                    product *= own
            if WANTS_RATES:
                total += product
            if MOMENTUM:
                r += tl.load(moment_adjoint + i, mask=mask & (is_last == 0), other=0)
                tl.store(moment_adjoint + i, momentum * r, mask=mask)
            if DECAY:
                tl.store(adjoint + i, v + decay * r, mask=mask)
            tl.store(direction + i, r, mask=mask)
        if WANTS_RATES:
            tl.store(d_rates + layer, tl.load(d_rates + layer) - tl.sum(total, 0))
    tl.debug_barrier()


@triton.jit
def net_tangents(
    memory,
    table,
    state,
    direction,
    rows,
    shift,
    L,
    BENT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Tangents of all inputs but the first, and of the logits; BENT: in place of other layers' what deltas get."""
    for layer in range(L):
        line = table + layer * WIDTH
        out, columns, begin = tl.load(line + OUT), tl.load(line + COLUMNS), tl.load(line + AT)
        source = memory + tl.load(line + STEP_INPUT) + tl.where(layer > 0, shift, 0)
        dot_source = memory + tl.load(line + DOT_INPUT)
        inner = tl.where(layer > 0, columns, 0)  # the first layer's input has no tangent
        before = memory + tl.load(line + BEFORE) + shift
        dot = memory + tl.load(line + DOT)
        following = tl.load(line + WIDTH + COLUMNS)
        dot_value = memory + tl.load(line + WIDTH + DOT_INPUT)
        w, d = state + begin, direction + begin
        for first in range(0, rows, BLOCK_R):
            r = first + tl.arange(0, BLOCK_R)
            row_mask = (r < rows)[:, None]
            for start in range(0, following, BLOCK_W):
                o = start + tl.arange(0, BLOCK_W)
                z_dot = tl.full([BLOCK_R, BLOCK_W], 0, ACC)
                o_mask = (o < out)[None, :]
                z_dot = add_product(
                    z_dot,
                    dot_source,
                    columns,
                    w,
                    columns,
                    r,
                    o,
                    row_mask,
                    o_mask,
                    inner,
                    False,
                    True,
                    PRECISION,
                    BLOCK_W,
                )
                z_dot = add_product(
                    z_dot, source, columns, d, columns, r, o, row_mask, o_mask, columns, False, True, PRECISION, BLOCK_W
                )
                mask = row_mask & o_mask
                at = r[:, None] * out + o[None, :]
                if layer + 1 < L:
                    if BENT:
                        bend = tl.load(memory + tl.load(line + BEND) + shift + at, mask=mask, other=0)
                        tl.store(dot + at, bend * z_dot, mask=mask)
                    z = tl.load(before + at, mask=mask, other=0)
                    h_dot = tl.where(mask, z_dot * activation_slope(z, ACTIVATION), 0.0)
                    at = r[:, None] * following + o[None, :]
                    tl.store(dot_value + at, h_dot, mask=row_mask & (o < following)[None, :])
                else:
                    tl.store(dot + at, z_dot, mask=mask)
        tl.debug_barrier()


@triton.jit
def delta_tangents(
    memory,
    table,
    state,
    direction,
    rows,
    shift,
    L,
    BENT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Tangents of the deltas of all hidden layers from those of the last."""
    for up in range(1, L):
        line = table + (L - up) * WIDTH
        below = line - WIDTH
        out, columns, width = tl.load(line + OUT), tl.load(line + COLUMNS), tl.load(below + OUT)
        begin = tl.load(line + AT)
        above = memory + tl.load(line + DELTA) + shift
        dot_above = memory + tl.load(line + DOT)
        before = memory + tl.load(below + BEFORE) + shift
        dot = memory + tl.load(below + DOT)
        w, d = state + begin, direction + begin
        for first in range(0, rows, BLOCK_R):
            r = first + tl.arange(0, BLOCK_R)
            row_mask = (r < rows)[:, None]
            for start in range(0, width, BLOCK_W):
                i = start + tl.arange(0, BLOCK_W)
                total = tl.full([BLOCK_R, BLOCK_W], 0, ACC)
                i_mask = (i < width)[None, :]
                total = add_product(
                    total, dot_above, out, w, columns, r, i, row_mask, i_mask, out, False, False, PRECISION, BLOCK_W
                )
                total = add_product(
                    total, above, out, d, columns, r, i, row_mask, i_mask, out, False, False, PRECISION, BLOCK_W
                )
                mask = row_mask & i_mask
                at = r[:, None] * width + i[None, :]
                total *= activation_slope(tl.load(before + at, mask=mask, other=0), ACTIVATION)
                if BENT:
                    total += tl.load(dot + at, mask=mask, other=0)
                tl.store(dot + at, total, mask=mask)
        tl.debug_barrier()


@triton.jit
def add_hessian_product(
    memory,
    table,
    adjoint,
    rows,
    shift,
    L,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """adjoint += D'^T A + D^T A', layer by layer (' is the tangent)."""
    for layer in range(L):
        line = table + layer * WIDTH
        out, columns, begin = tl.load(line + OUT), tl.load(line + COLUMNS), tl.load(line + AT)
        source = memory + tl.load(line + INPUT) + tl.where(layer > 0, shift, 0)
        dot_source = memory + tl.load(line + DOT_INPUT)
        inner = tl.where(layer > 0, rows, 0)
        delta = memory + tl.load(line + DELTA) + shift
        dot = memory + tl.load(line + DOT)
        for first in range(0, out, BLOCK_W):
            o = first + tl.arange(0, BLOCK_W)
            o_mask = (o < out)[:, None]
            for start in range(0, columns, BLOCK_W):
                c = start + tl.arange(0, BLOCK_W)
                total = tl.full([BLOCK_W, BLOCK_W], 0, ACC)
                c_mask = (c < columns)[None, :]
                total = add_product(
                    total, dot, out, source, columns, o, c, o_mask, c_mask, rows, True, False, PRECISION, BLOCK_R
                )
                total = add_product(
                    total, delta, out, dot_source, columns, o, c, o_mask, c_mask, inner, True, False, PRECISION, BLOCK_R
                )
                mask = o_mask & c_mask
                at = begin + o[:, None] * columns + c[None, :]
                tl.store(adjoint + at, total + tl.load(adjoint + at, mask=mask, other=0), mask=mask)


@triton.jit
def add_input_gradient(
    out,
    dot,
    state,
    delta,
    direction,
    rows,
    width,
    columns,
    outputs,
    THROUGH_STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """out `[rows, width]` += dot W, of the first layer. THROUGH_STEP: plus delta R, where its input made the step."""
    for first in range(0, rows, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        row_mask = (r < rows)[:, None]
        for start in range(0, width, BLOCK_W):
            i = start + tl.arange(0, BLOCK_W)
            total = tl.full([BLOCK_R, BLOCK_W], 0, ACC)
            i_mask = (i < width)[None, :]
            total = add_product(
                total, dot, outputs, state, columns, r, i, row_mask, i_mask, outputs, False, False, PRECISION, BLOCK_W
            )
            if THROUGH_STEP:
                total = add_product(
                    total, delta, outputs, direction, columns, r, i, row_mask, i_mask, outputs, False, False, PRECISION,
                    BLOCK_W,
                )  # fmt: skip
            mask = row_mask & i_mask
            at = r[:, None] * width + i[None, :]
            tl.store(out + at, total + tl.load(out + at, mask=mask, other=0), mask=mask)


@triton.jit
def sweep(
    memory,
    states,
    moments,
    adjoint,
    table,
    numbers,
    target,
    row_weight,
    rates,
    element_rates,
    d_input,
    d_base,
    d_rates,
    d_element_rates,
    S,
    K,
    L,
    P,
    IN,
    record,
    GIVEN: tl.constexpr,
    LOSS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MOMENTUM: tl.constexpr,
    DECAY: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
    CURVED: tl.constexpr,
    BENT: tl.constexpr,
    WANTS_RATES: tl.constexpr,
    WANTS_INPUT: tl.constexpr,
    WANTS_BASE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """From the adjoint of the adapted state to that of the first; what else has a gradient gets it on the way.

    CURVED: not for first-order MAML, which takes the steps' gradients for constants.
    """
    momentum, decay, bends_at = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    last = table + (L - 1) * WIDTH
    direction = adjoint + P
    moment_adjoint = direction + P
    for back in range(1, K + 1):
        k = K - back
        take_direction(
            adjoint,
            direction,
            moment_adjoint,
            moments + k * P,
            table,
            rates + k * L,
            element_rates,
            d_rates + k * L,
            d_element_rates,
            momentum,
            decay,
            back == 1,
            L,
            MOMENTUM,
            DECAY,
            ELEMENTWISE,
            WANTS_RATES,
            ACC,
            BLOCK_P,
        )
        if CURVED:
            state, shift = states + k * P, k * record
            net_tangents(
                memory, table, state, direction, S, shift, L, BENT, ACTIVATION, PRECISION, ACC, BLOCK_R, BLOCK_W
            )
            times_curvature(
                memory + tl.load(last + BEFORE) + shift,
                memory + tl.load(last + DOT),
                target,
                row_weight,
                bends_at,
                S,
                tl.load(last + OUT),
                LOSS,
                ACC,
                BLOCK_R,
                BLOCK_W,
            )
            tl.debug_barrier()
            delta_tangents(
                memory, table, state, direction, S, shift, L, BENT, ACTIVATION, PRECISION, ACC, BLOCK_R, BLOCK_W
            )
            add_hessian_product(memory, table, adjoint, S, shift, L, PRECISION, ACC, BLOCK_R, BLOCK_W)
            dot = memory + tl.load(table + DOT)
            if WANTS_INPUT:
                add_input_gradient(
                    d_input,
                    dot,
                    state,
                    memory + tl.load(table + DELTA) + shift,
                    direction,
                    S,
                    IN,
                    tl.load(table + COLUMNS),
                    tl.load(table + OUT),
                    not GIVEN,
                    PRECISION,
                    ACC,
                    BLOCK_R,
                    BLOCK_W,
                )
            if WANTS_BASE:
                add_state(dot, d_base, S * tl.load(table + OUT), BLOCK_P)
            tl.debug_barrier()
