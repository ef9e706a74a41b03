"""The direction of a step's Hessian product, and what the step's rates get: the way back through an update."""

from __future__ import annotations

import triton
import triton.language as tl

from fastmeta.kernels.inner_loop.table import AT, COLUMNS, OUT, WIDTH


@triton.jit
def take_direction(adjoint, moment, rates, d_rates, problem, is_last, HOW: tl.constexpr):
    """R = U - rate * V, V += decay * R, U = momentum * R, for the adjoints V of the state and U of the moments; and
    what the step's rates get, `-V * moment`. R and U stand behind V."""
    direction = adjoint + problem.places.state
    moment_adjoint = direction + problem.places.state
    momentum, decay = tl.load(problem.numbers), tl.load(problem.numbers + 1)
    for layer in range(problem.sizes.layers):
        line = problem.table + layer * WIDTH
        begin = tl.load(line + AT)
        end = begin + tl.load(line + OUT) * tl.load(line + COLUMNS)
        rate = tl.load(rates.layers + layer)
        total = tl.full([HOW.BLOCK_P], 0, HOW.ACC)
        for start in range(begin, end, HOW.BLOCK_P):
            i = start + tl.arange(0, HOW.BLOCK_P)
            mask = i < end
            v = tl.load(adjoint + i, mask=mask, other=0)
            if HOW.WANTS_RATES:
                product = v * tl.load(moment + i, mask=mask, other=0)
            r = -rate * v
            if HOW.ELEMENTWISE:
                own = tl.load(rates.elements + i, mask=mask, other=0)
                r *= own
                if HOW.WANTS_RATES:
                    before = tl.load(d_rates.elements + i, mask=mask, other=0)
                    tl.store(d_rates.elements + i, before - rate * product, mask=mask)
                    product *= own
            if HOW.WANTS_RATES:
                total += product
            if HOW.MOMENTUM:
                r += tl.load(moment_adjoint + i, mask=mask & (is_last == 0), other=0)
                tl.store(moment_adjoint + i, momentum * r, mask=mask)
            if HOW.DECAY:
                tl.store(adjoint + i, v + decay * r, mask=mask)
            tl.store(direction + i, r, mask=mask)
        if HOW.WANTS_RATES:
            tl.store(d_rates.layers + layer, tl.load(d_rates.layers + layer) - tl.sum(total, 0))
    tl.debug_barrier()
