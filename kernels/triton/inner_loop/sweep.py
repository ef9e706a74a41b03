"""The way back through a task's steps: a product with the Hessian of each step's loss, in the adjoint's direction."""

from __future__ import annotations

import triton
import triton.language as tl

from fastmeta.kernels.inner_loop.direction import take_direction
from fastmeta.kernels.inner_loop.losses import times_curvature
from fastmeta.kernels.inner_loop.products import add_state
from fastmeta.kernels.inner_loop.structures import Pass, Rates, Targets
from fastmeta.kernels.inner_loop.table import BEFORE, DELTA, DOT, OUT, WIDTH
from fastmeta.kernels.inner_loop.tangents import add_hessian_product, add_input_gradient, delta_tangents, net_tangents


@triton.jit
def sweep(memory, rows, rates, gradients, problem, HOW: tl.constexpr):
    """From the adjoint of the adapted state to that of the first; what else has a gradient gets it on the way."""
    table, sizes, places = problem.table, problem.sizes, problem.places
    last = table + (sizes.layers - 1) * WIDTH
    targets = Targets(rows.target, rows.weight, tl.load(problem.numbers + 2), sizes.support, tl.load(last + OUT))
    adjoint = memory + places.adjoint
    direction = adjoint + places.state
    for back in range(1, sizes.steps + 1):
        k = sizes.steps - back
        moment = memory + places.moments + k * places.state
        of_step = Rates(rates.layers + k * sizes.layers, rates.elements)
        d_rates = Rates(gradients.rates.layers + k * sizes.layers, gradients.rates.elements)
        take_direction(adjoint, moment, of_step, d_rates, problem, back == 1, HOW)
        if HOW.CURVED:
            state = memory + places.states + k * places.state
            run = Pass(memory, table, sizes.layers, sizes.support, state, k * places.record)
            net_tangents(run, direction, HOW)
            times_curvature(memory + tl.load(last + BEFORE) + run.shift, memory + tl.load(last + DOT), targets, HOW)
            tl.debug_barrier()
            delta_tangents(run, direction, HOW)
            add_hessian_product(run, adjoint, HOW)
            dot, delta = memory + tl.load(table + DOT), memory + tl.load(table + DELTA) + run.shift
            if HOW.WANTS_INPUT:
                add_input_gradient(gradients.input, dot, delta, direction, run, sizes.width, not HOW.GIVEN, HOW)
            if HOW.WANTS_BASE:
                add_state(dot, gradients.base, sizes.support * tl.load(table + OUT), HOW)
            tl.debug_barrier()
