"""A task's `K` steps of gradient descent by one program, forward in time; `sweep` goes back.

A *state* is all weights of one moment, layer by layer, each row of a weight with its bias behind it: rows have a one
there, and no code below knows of biases. In the Gram form the first layer is one like the others as well: its input are
the inner products `G`, its weight `U` `[O_1, S]` starts at 0 (minus the coefficients, transposed), and `X` is added to
what it makes of them. Only what a step adds to `U` is not made of `G` but of the identity in its place: the *step
input*.

Everything lies in the program's part of one scratch tensor: states, and the rows of all steps. Where is said by a table
with a line for each layer; `layout` makes it. A program counts its own elements in 32 bits, which
`why_not` sees to. All threads wait (`tl.debug_barrier`) before what some have stored is loaded by others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmeta.kernels._common import activate, activation_slope
from fastmeta.kernels.inner_loop.losses import loss_gradient
from fastmeta.kernels.inner_loop.products import add_product

# columns of a layer's line in the table
OUT = tl.constexpr(0)  # its width
COLUMNS = tl.constexpr(1)  # elements of a weight's row: inputs, and the bias
AT = tl.constexpr(2)  # where it is in a state
# where the support rows have its input, its pre-activations, their gradients (deltas), and what delta gets of a tangent
INPUT = tl.constexpr(3)
BEFORE = tl.constexpr(4)
DELTA = tl.constexpr(5)
BEND = tl.constexpr(6)
QUERY = tl.constexpr(4)  # the same of query rows: so many columns on
STEP_INPUT = tl.constexpr(11)
DOT_INPUT = tl.constexpr(12)  # tangents of the input
DOT = tl.constexpr(13)  # tangents of pre-activations, then of deltas
WIDTH = tl.constexpr(14)  # of a line


@triton.jit
def activation_bend(x, ACTIVATION: tl.constexpr):
    """Second derivative of `activate` at `x`, for those that have one."""
    if ACTIVATION == 2:
        return -2 * activate(x, 2) * activation_slope(x, 2)
    elif ACTIVATION == 3:
        return activation_slope(x, 3) * (1 - 2 * activate(x, 3))
    elif ACTIVATION == 4:
        s = activate(x, 3)
        return activation_slope(x, 3) * (2 + x * (1 - 2 * s))
    elif ACTIVATION == 5:
        return 0.39894228040143267794 * tl.exp(-0.5 * x * x) * (2 - x * x)
    else:
        return -tl.sin(x)


@triton.jit
def net(
    memory,
    table,
    state,
    base,
    rows,
    shift,
    L,
    SIDE: tl.constexpr,
    GIVEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Pre-activations of all layers, and the inputs of all but the first; `shift`: from the rows of the first step.

    SIDE: 0 for support rows, QUERY for query rows.
    """
    for layer in range(L):
        line = table + layer * WIDTH
        out, columns = tl.load(line + OUT), tl.load(line + COLUMNS)
        weight = state + tl.load(line + AT)
        source = memory + tl.load(line + (INPUT + SIDE)) + tl.where(layer > 0, shift, 0)
        before = memory + tl.load(line + (BEFORE + SIDE)) + shift
        following = tl.load(line + WIDTH + COLUMNS)  # of the last layer: its outputs
        value = memory + tl.load(line + (WIDTH + INPUT + SIDE)) + shift
        for first in range(0, rows, BLOCK_R):
            r = first + tl.arange(0, BLOCK_R)
            row_mask = (r < rows)[:, None]
            for start in range(0, following, BLOCK_W):
                o = start + tl.arange(0, BLOCK_W)
                z = tl.full([BLOCK_R, BLOCK_W], 0, ACC)
                o_mask = (o < out)[None, :]
                z = add_product(
                    z,
                    source,
                    columns,
                    weight,
                    columns,
                    r,
                    o,
                    row_mask,
                    o_mask,
                    columns,
                    False,
                    True,
                    PRECISION,
                    BLOCK_W,
                )
                mask = row_mask & o_mask
                at = r[:, None] * out + o[None, :]
                if GIVEN:
                    z += tl.load(base + at, mask=mask & (layer == 0), other=0)
                tl.store(before + at, z, mask=mask)
                if layer + 1 < L:
                    # behind the last column the one that biases are multiplied by
                    h = tl.where(o_mask, activate(z, ACTIVATION), 1.0)
                    at = r[:, None] * following + o[None, :]
                    tl.store(value + at, h, mask=row_mask & (o < following)[None, :])
        tl.debug_barrier()


@triton.jit
def deltas(
    memory,
    table,
    state,
    rows,
    shift,
    L,
    SIDE: tl.constexpr,
    BENT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Deltas of all hidden layers from those of the last; BENT: also what they get of a tangent at their layer."""
    for up in range(1, L):
        line = table + (L - up) * WIDTH
        below = line - WIDTH
        out, columns, width = tl.load(line + OUT), tl.load(line + COLUMNS), tl.load(below + OUT)
        weight = state + tl.load(line + AT)
        above = memory + tl.load(line + (DELTA + SIDE)) + shift
        before = memory + tl.load(below + (BEFORE + SIDE)) + shift
        delta = memory + tl.load(below + (DELTA + SIDE)) + shift
        for first in range(0, rows, BLOCK_R):
            r = first + tl.arange(0, BLOCK_R)
            row_mask = (r < rows)[:, None]
            for start in range(0, width, BLOCK_W):
                i = start + tl.arange(0, BLOCK_W)
                d = tl.full([BLOCK_R, BLOCK_W], 0, ACC)
                i_mask = (i < width)[None, :]
                d = add_product(
                    d, above, out, weight, columns, r, i, row_mask, i_mask, out, False, False, PRECISION, BLOCK_W
                )
                mask = row_mask & i_mask
                at = r[:, None] * width + i[None, :]
                z = tl.load(before + at, mask=mask, other=0)
                tl.store(delta + at, d * activation_slope(z, ACTIVATION), mask=mask)
                if BENT:
                    bend = memory + tl.load(below + BEND) + shift
                    tl.store(bend + at, d * activation_bend(z, ACTIVATION), mask=mask)
        tl.debug_barrier()


@triton.jit
def update(
    memory,
    table,
    state,
    next_state,
    moment,
    next_moment,
    rates,
    element_rates,
    momentum,
    decay,
    is_first,
    rows,
    shift,
    L,
    MOMENTUM: tl.constexpr,
    DECAY: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
    KEEP_MOMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """W' = W - rate * M', M' = momentum * M + gradient + decay * W; rates `[L]`, those of this step."""
    for layer in range(L):
        line = table + layer * WIDTH
        out, columns, begin = tl.load(line + OUT), tl.load(line + COLUMNS), tl.load(line + AT)
        rate = tl.load(rates + layer)
        source = memory + tl.load(line + STEP_INPUT) + tl.where(layer > 0, shift, 0)
        delta = memory + tl.load(line + DELTA) + shift
        for first in range(0, out, BLOCK_W):
            o = first + tl.arange(0, BLOCK_W)
            o_mask = (o < out)[:, None]
            for start in range(0, columns, BLOCK_W):
                c = start + tl.arange(0, BLOCK_W)
                g = tl.full([BLOCK_W, BLOCK_W], 0, ACC)
                c_mask = (c < columns)[None, :]
                g = add_product(
                    g, delta, out, source, columns, o, c, o_mask, c_mask, rows, True, False, PRECISION, BLOCK_R
                )
                mask = o_mask & c_mask
                at = begin + o[:, None] * columns + c[None, :]
                w = tl.load(state + at, mask=mask, other=0)
                if DECAY:
                    g += decay * w
                if MOMENTUM:
                    g += momentum * tl.load(moment + at, mask=mask & (is_first == 0), other=0)
                if MOMENTUM or KEEP_MOMENTS:
                    tl.store(next_moment + at, g, mask=mask)
                if ELEMENTWISE:
                    g *= tl.load(element_rates + at, mask=mask, other=0)
                tl.store(next_state + at, w - rate * g, mask=mask)
    tl.debug_barrier()


@triton.jit
def adapt(
    memory,
    states,
    moments,
    table,
    numbers,
    base,
    target,
    row_weight,
    rates,
    element_rates,
    S,
    K,
    L,
    P,
    record,
    GIVEN: tl.constexpr,
    LOSS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MOMENTUM: tl.constexpr,
    DECAY: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
    KEEP: tl.constexpr,
    KEEP_MOMENTS: tl.constexpr,
    BENT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """All steps from the first of `states`. KEEP: each step leaves its rows, `record` elements, and a state of its own.

    KEEP_MOMENTS: and what its update was made of. numbers: momentum, weight decay, and where the Huber loss bends.
    """
    momentum, decay, bends_at = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    last = table + (L - 1) * WIDTH
    C = tl.load(last + OUT)
    for k in range(K):
        shift = k * record if KEEP else 0
        state = states + k * P if KEEP else states
        next_state = state + P if KEEP else states
        next_moment = moments + k * P if KEEP_MOMENTS else moments
        moment = next_moment - P if KEEP_MOMENTS else moments
        net(memory, table, state, base, S, shift, L, 0, GIVEN, ACTIVATION, PRECISION, ACC, BLOCK_R, BLOCK_W)
        loss_gradient(
            memory + tl.load(last + BEFORE) + shift,
            memory + tl.load(last + DELTA) + shift,
            target,
            row_weight,
            1.0,
            base,
            bends_at,
            S,
            C,
            LOSS,
            False,
            ACC,
            BLOCK_R,
            BLOCK_W,
        )
        tl.debug_barrier()
        deltas(memory, table, state, S, shift, L, 0, BENT, ACTIVATION, PRECISION, ACC, BLOCK_R, BLOCK_W)
        update(
            memory,
            table,
            state,
            next_state,
            moment,
            next_moment,
            rates + k * L,
            element_rates,
            momentum,
            decay,
            k == 0,
            S,
            shift,
            L,
            MOMENTUM,
            DECAY,
            ELEMENTWISE,
            KEEP_MOMENTS,
            PRECISION,
            ACC,
            BLOCK_R,
            BLOCK_W,
        )
