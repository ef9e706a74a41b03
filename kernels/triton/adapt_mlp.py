"""Fast weights of every task after `K` inner steps, and their gradient: a program takes one task after the other."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmeta.kernels._common import launch
from fastmeta.kernels.inner_loop.call import Call, Wants
from fastmeta.kernels.inner_loop.examples import examples
from fastmeta.kernels.inner_loop.products import add_state, copy_state
from fastmeta.kernels.inner_loop.task import begin_program, sweep_back, take_steps


@triton.jit
def adapt_kernel(
    support,
    inputs,
    memory,
    out,
    sizes,
    places,
    strides,
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
    """out `[T, P]`: the adapted states."""
    size, states_at, moments_at, adjoint_at, record, P = places
    program = tl.program_id(0).to(tl.int64)
    memory += program * size
    begin_program(memory, inputs[4], sizes[1], GIVEN, ACC, BLOCK_R, BLOCK_W)
    for task in range(program, sizes[0], tl.num_programs(0)):
        adapted = take_steps(
            task,
            memory,
            support,
            inputs,
            sizes,
            places,
            strides,
            False,
            False,
            False,
            GIVEN,
            LOSS,
            ACTIVATION,
            MOMENTUM,
            DECAY,
            ELEMENTWISE,
            PRECISION,
            ACC,
            BLOCK_R,
            BLOCK_W,
            BLOCK_P,
        )
        copy_state(adapted, out + task * P, P, BLOCK_P)


@triton.jit
def adapt_bwd_kernel(
    grad,
    support,
    inputs,
    memory,
    d_support,
    sums,
    sizes,
    places,
    strides,
    WANTS_INPUT: tl.constexpr,
    WANTS_BASE: tl.constexpr,
    WANTS_STATE: tl.constexpr,
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
    SWEEPS: tl.constexpr,
    CURVED: tl.constexpr,
    BENT: tl.constexpr,
    WANTS_RATES: tl.constexpr,
):
    """Adds what `grad` `[T, P]`, of the adapted states, gives to `d_support` and `sums`."""
    size, states_at, moments_at, adjoint_at, record, P = places
    program = tl.program_id(0).to(tl.int64)
    memory += program * size
    adjoint = memory + adjoint_at
    begin_program(memory, inputs[4], sizes[1], GIVEN, ACC, BLOCK_R, BLOCK_W)
    for task in range(program, sizes[0], tl.num_programs(0)):
        tl.debug_barrier()  # the task before may still be read
        copy_state(grad + task * P, adjoint, P, BLOCK_P)
        if SWEEPS:
            take_steps(
                task,
                memory,
                support,
                inputs,
                sizes,
                places,
                strides,
                True,
                WANTS_RATES,
                BENT,
                GIVEN,
                LOSS,
                ACTIVATION,
                MOMENTUM,
                DECAY,
                ELEMENTWISE,
                PRECISION,
                ACC,
                BLOCK_R,
                BLOCK_W,
                BLOCK_P,
            )
            sweep_back(
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
        if WANTS_STATE:
            tl.debug_barrier()
            add_state(adjoint, sums[0] + tl.where(strides[0] > 0, task, program) * P, P, BLOCK_P)


def _call(support_x, support_y, support_weight, gram_support, *rest, wants: Wants | None = None) -> Call:
    return Call((support_x, support_y, support_weight, gram_support), None, *rest, wants=wants)


def _backward_call(args: tuple) -> Call:
    return _call(*args[3:-1], wants=Wants.of(args[-1], 2))


def why_not(*args) -> str | None:
    return _call(*args).why_not()


def why_not_bwd(*args) -> str | None:
    return _backward_call(args).why_not()


def adapt_mlp(*args) -> tuple[list[Tensor], list[Tensor], Tensor]:
    call = _call(*args)
    out = call.support.x.new_empty(call.tasks, call.layout.state)
    launch(
        adapt_kernel,
        call.programs,
        call.support.pointers,
        call.inputs,
        call.new_scratch(),
        out,
        call.sizes,
        call.places,
        call.strides,
        **call.constants,
    )
    return call.fast_weights(out)


def adapt_mlp_bwd(*args) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor, list[Tensor]]:
    call = _backward_call(args)
    d_support, sums = call.support.gradients(args[-1], 0, 1), call.new_sums()
    launch(
        adapt_bwd_kernel,
        call.programs,
        call.state(*args[:3]).expand(call.tasks, -1).contiguous(),
        call.support.pointers,
        call.inputs,
        call.new_scratch(),
        d_support.pointers,
        sums,
        call.sizes,
        call.places,
        call.strides,
        WANTS_INPUT=d_support.wanted[0],
        WANTS_BASE=d_support.wanted[1],
        WANTS_STATE=call.wants.weights or call.wants.biases,
        **call.constants,
    )
    return d_support.x, d_support.gram, *call.split(sums)


def aot(new):
    """Representative calls, for compilation ahead of time; `new(*shape)` makes a tensor."""
    for support, _, rest in examples(new):
        grads = adapt_mlp(*support, *rest)
        adapt_mlp_bwd(*grads, *support, *rest, 63)
