"""A task from its start in the program's scratch through all its steps, and back.

What tuples hold (`call.Call` makes them): of rows, input, pre-activations of the first layer in the Gram
form, targets, and weights; inputs: first states, rates, rates of elements, numbers, table.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmeta.kernels.inner_loop.products import copy_rows, copy_state
from fastmeta.kernels.inner_loop.steps import COLUMNS, INPUT, OUT, STEP_INPUT, WIDTH, adapt
from fastmeta.kernels.inner_loop.sweep import sweep


@triton.jit
def begin_program(
    memory, table, S, GIVEN: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr
):
    """What all tasks of a program share: in the Gram form the identity `[S, S]`, the step input."""
    if GIVEN:
        identity = memory + tl.load(table + STEP_INPUT)
        for first in range(0, S, BLOCK_R):
            r = (first + tl.arange(0, BLOCK_R))[:, None]
            for start in range(0, S, BLOCK_W):
                c = (start + tl.arange(0, BLOCK_W))[None, :]
                tl.store(identity + r * S + c, (r == c).to(ACC), mask=(r < S) & (c < S))


@triton.jit
def rows_of(rows, task, count, table, sizes, LOSS: tl.constexpr):
    """Rows of one task, of `count` rows of each."""
    source, base, target, row_weight = rows
    T, S, Q, K, L, IN, FIRST = sizes
    start = task * count
    targets = start if LOSS == 0 else start * tl.load(table + (L - 1) * WIDTH + OUT)
    return source + start * IN, base + start * FIRST, target + targets, row_weight + start


@triton.jit
def take_steps(
    task,
    memory,
    support,
    inputs,
    sizes,
    places,
    strides,
    KEEP: tl.constexpr,
    KEEP_MOMENTS: tl.constexpr,
    BENT: tl.constexpr,
    GIVEN: tl.constexpr,
    LOSS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MOMENTUM: tl.constexpr,
    DECAY: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """From the task's first state; returns where the adapted one is."""
    initial, rates, element_rates, numbers, table = inputs
    T, S, Q, K, L, IN, FIRST = sizes
    size, states_at, moments_at, adjoint_at, record, P = places
    initial_stride, rates_stride, element_stride = strides
    source, base, target, row_weight = rows_of(support, task, S, table, sizes, LOSS)
    states = memory + states_at
    tl.debug_barrier()  # the task before may still be read
    copy_state(initial + task * initial_stride, states, P, BLOCK_P)
    copy_rows(source, memory + tl.load(table + INPUT), S, IN, tl.load(table + COLUMNS), BLOCK_R, BLOCK_W)
    tl.debug_barrier()
    adapt(
        memory,
        states,
        memory + moments_at,
        table,
        numbers,
        base,
        target,
        row_weight,
        rates + task * rates_stride,
        element_rates + task * element_stride,
        S,
        K,
        L,
        P,
        record,
        GIVEN,
        LOSS,
        ACTIVATION,
        MOMENTUM,
        DECAY,
        ELEMENTWISE,
        KEEP,
        KEEP_MOMENTS,
        BENT,
        PRECISION,
        ACC,
        BLOCK_R,
        BLOCK_W,
    )
    return states + K * P if KEEP else states


@triton.jit
def sweep_back(
    task,
    program,
    memory,
    support,
    inputs,
    d_support,
    sums,
    sizes,
    places,
    strides,
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
    """From the adjoint of the adapted state to that of the first, after `take_steps` that kept them; gradients are
    added to, of what tasks share to the program's own."""
    d_input, d_base = d_support
    d_state, d_rates, d_element_rates = sums
    initial, rates, element_rates, numbers, table = inputs
    T, S, Q, K, L, IN, FIRST = sizes
    size, states_at, moments_at, adjoint_at, record, P = places
    initial_stride, rates_stride, element_stride = strides
    source, base, target, row_weight = rows_of(support, task, S, table, sizes, LOSS)
    sweep(
        memory,
        memory + states_at,
        memory + moments_at,
        memory + adjoint_at,
        table,
        numbers,
        target,
        row_weight,
        rates + task * rates_stride,
        element_rates + task * element_stride,
        d_input + task * (S * IN),
        d_base + task * (S * FIRST),
        d_rates + tl.where(rates_stride > 0, task, program) * (K * L),
        d_element_rates + tl.where(element_stride > 0, task, program) * P,
        S,
        K,
        L,
        P,
        IN,
        record,
        GIVEN,
        LOSS,
        ACTIVATION,
        MOMENTUM,
        DECAY,
        ELEMENTWISE,
        CURVED,
        BENT,
        WANTS_RATES,
        WANTS_INPUT,
        WANTS_BASE,
        PRECISION,
        ACC,
        BLOCK_R,
        BLOCK_W,
        BLOCK_P,
    )
