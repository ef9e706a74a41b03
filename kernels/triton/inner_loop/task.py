"""A task from its start in the program's scratch through all its steps, and back."""

from __future__ import annotations

import triton
import triton.language as tl

from fastmeta.kernels.inner_loop.products import add_state, copy_rows, copy_state
from fastmeta.kernels.inner_loop.steps import adapt
from fastmeta.kernels.inner_loop.structures import Gradients, Rates, Rows
from fastmeta.kernels.inner_loop.sweep import sweep
from fastmeta.kernels.inner_loop.table import COLUMNS, INPUT, OUT, STEP_INPUT, WIDTH


@triton.jit
def begin_program(memory, problem, HOW: tl.constexpr):
    """What all tasks of a program share: in the Gram form the identity `[S, S]`, the step input."""
    if HOW.GIVEN:
        S = problem.sizes.support
        identity = memory + tl.load(problem.table + STEP_INPUT)
        for first in range(0, S, HOW.BLOCK_R):
            r = (first + tl.arange(0, HOW.BLOCK_R))[:, None]
            for start in range(0, S, HOW.BLOCK_W):
                c = (start + tl.arange(0, HOW.BLOCK_W))[None, :]
                tl.store(identity + r * S + c, (r == c).to(HOW.ACC), mask=(r < S) & (c < S))


@triton.jit
def rows_of(task, rows, count, problem, HOW: tl.constexpr):
    """Rows of one task, of `count` rows of each."""
    sizes = problem.sizes
    start = task * count
    outputs = 1 if HOW.LOSS == 0 else tl.load(problem.table + (sizes.layers - 1) * WIDTH + OUT)
    return Rows(
        rows.input + start * sizes.width,
        rows.base + start * sizes.first,
        rows.target + start * outputs,
        rows.weight + start,
    )


@triton.jit
def rates_of(task, problem):
    strides = problem.strides
    return Rates(problem.rates + task * strides.rates, problem.elements + task * strides.elements)


@triton.jit
def take_steps(task, memory, support, problem, HOW: tl.constexpr):
    """From the task's first state; returns where the adapted one is."""
    sizes, places, table = problem.sizes, problem.places, problem.table
    rows = rows_of(task, support, sizes.support, problem, HOW)
    states = memory + places.states
    tl.debug_barrier()  # the task before may still be read
    copy_state(problem.initial + task * problem.strides.initial, states, places.state, HOW)
    copy_rows(rows.input, memory + tl.load(table + INPUT), sizes.support, sizes.width, tl.load(table + COLUMNS), HOW)
    tl.debug_barrier()
    adapt(memory, rows, rates_of(task, problem), problem, HOW)
    return states + sizes.steps * places.state if HOW.SWEEPS else states


@triton.jit
def go_back(task, program, memory, support, problem, d_support, sums, HOW: tl.constexpr):
    """From the adjoint of the adapted state to that of the first, through the steps where `take_steps` kept them;
    gradients are added to, of what tasks share to the program's own."""
    sizes, places, strides = problem.sizes, problem.places, problem.strides
    if HOW.SWEEPS:
        rows = rows_of(task, support, sizes.support, problem, HOW)
        d_rates = Rates(
            sums.rates + tl.where(strides.rates > 0, task, program) * (sizes.steps * sizes.layers),
            sums.elements + tl.where(strides.elements > 0, task, program) * places.state,
        )
        gradients = Gradients(
            d_support.input + task * (sizes.support * sizes.width),
            d_support.base + task * (sizes.support * sizes.first),
            d_rates,
        )
        sweep(memory, rows, rates_of(task, problem), gradients, problem, HOW)
    if HOW.WANTS_STATE:
        tl.debug_barrier()
        to = sums.initial + tl.where(strides.initial > 0, task, program) * places.state
        add_state(memory + places.adjoint, to, places.state, HOW)
