"""The query loss of every task after `K` inner steps, and its gradient: a program takes one task after the other."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmeta.kernels._common import launch
from fastmeta.kernels.inner_loop.call import Call, Wants
from fastmeta.kernels.inner_loop.examples import examples
from fastmeta.kernels.inner_loop.products import add_state
from fastmeta.kernels.inner_loop.query import query_backward, query_forward, query_net
from fastmeta.kernels.inner_loop.task import begin_program, rows_of, sweep_back, take_steps


@triton.jit
def meta_loss_kernel(
    support,
    query,
    inputs,
    memory,
    losses,
    logits,
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
    """losses `[T]`, logits `[T, Q, C]`."""
    table, numbers = inputs[4], inputs[3]
    program = tl.program_id(0).to(tl.int64)
    memory += program * places[0]
    begin_program(memory, table, sizes[1], GIVEN, ACC, BLOCK_R, BLOCK_W)
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
        rows, base, target, row_weight = rows_of(query, task, sizes[2], table, sizes, LOSS)
        query_net(memory, adapted, table, rows, base, sizes, GIVEN, ACTIVATION, PRECISION, ACC, BLOCK_R, BLOCK_W)
        query_forward(
            task,
            memory,
            table,
            numbers,
            target,
            row_weight,
            losses,
            logits,
            sizes,
            LOSS,
            ACC,
            BLOCK_R,
            BLOCK_W,
            BLOCK_P,
        )


@triton.jit
def meta_loss_bwd_kernel(
    grad_losses,
    grad_logits,
    support,
    query,
    inputs,
    memory,
    d_support,
    d_query,
    sums,
    sizes,
    places,
    strides,
    WANTS_INPUT: tl.constexpr,
    WANTS_BASE: tl.constexpr,
    WANTS_QUERY_INPUT: tl.constexpr,
    WANTS_QUERY_BASE: tl.constexpr,
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
    """Adds what the gradients of losses `[T]` and logits `[T, Q, C]` give to `d_support`, `d_query` and `sums`."""
    table, numbers = inputs[4], inputs[3]
    size, states_at, moments_at, adjoint_at, record, P = places
    program = tl.program_id(0).to(tl.int64)
    memory += program * size
    adjoint = memory + adjoint_at
    begin_program(memory, table, sizes[1], GIVEN, ACC, BLOCK_R, BLOCK_W)
    for task in range(program, sizes[0], tl.num_programs(0)):
        adapted = take_steps(
            task,
            memory,
            support,
            inputs,
            sizes,
            places,
            strides,
            SWEEPS,
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
        rows, base, target, row_weight = rows_of(query, task, sizes[2], table, sizes, LOSS)
        query_net(memory, adapted, table, rows, base, sizes, GIVEN, ACTIVATION, PRECISION, ACC, BLOCK_R, BLOCK_W)
        query_backward(
            task,
            memory,
            adapted,
            adjoint,
            table,
            numbers,
            target,
            row_weight,
            grad_losses,
            grad_logits,
            d_query,
            sizes,
            LOSS,
            ACTIVATION,
            WANTS_QUERY_INPUT,
            WANTS_QUERY_BASE,
            PRECISION,
            ACC,
            BLOCK_R,
            BLOCK_W,
            BLOCK_P,
        )
        if SWEEPS:
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


def _call(support_x, support_y, support_weight, query_x, query_y, query_weight, gram_support, gram_query, *rest,
          wants: Wants | None = None) -> Call:  # fmt: skip
    support = support_x, support_y, support_weight, gram_support
    return Call(support, (query_x, query_y, query_weight, gram_query), *rest, wants=wants)


def _backward_call(args: tuple) -> Call:
    return _call(*args[2:-1], wants=Wants.of(args[-1], 4))


def why_not(*args) -> str | None:
    return _call(*args).why_not()


def why_not_bwd(*args) -> str | None:
    return _backward_call(args).why_not()


def meta_loss_mlp(*args) -> tuple[Tensor, Tensor]:
    call = _call(*args)
    x = call.query.x
    losses, logits = x.new_empty(call.tasks), x.new_empty(*x.shape[:2], call.outputs)
    launch(
        meta_loss_kernel,
        call.programs,
        call.support.pointers,
        call.query.pointers,
        call.inputs,
        call.new_scratch(),
        losses,
        logits,
        call.sizes,
        call.places,
        call.strides,
        **call.constants,
    )
    return losses, logits


def meta_loss_mlp_bwd(*args) -> tuple:
    call, needs = _backward_call(args), args[-1]
    d_support, d_query = call.support.gradients(needs, 0, 2), call.query.gradients(needs, 1, 3)
    sums = call.new_sums()
    launch(
        meta_loss_bwd_kernel,
        call.programs,
        *args[:2],
        call.support.pointers,
        call.query.pointers,
        call.inputs,
        call.new_scratch(),
        d_support.pointers,
        d_query.pointers,
        sums,
        call.sizes,
        call.places,
        call.strides,
        WANTS_INPUT=d_support.wanted[0],
        WANTS_BASE=d_support.wanted[1],
        WANTS_QUERY_INPUT=d_query.wanted[0],
        WANTS_QUERY_BASE=d_query.wanted[1],
        WANTS_STATE=call.wants.weights or call.wants.biases,
        **call.constants,
    )
    return d_support.x, d_query.x, d_support.gram, d_query.gram, *call.split(sums)


def aot(new):
    """Representative calls, for compilation ahead of time; `new(*shape)` makes a tensor."""
    for (*support, gram_support), (*query, gram_query), rest in examples(new):
        arguments = *support, *query, gram_support, gram_query, *rest
        meta_loss_mlp_bwd(*meta_loss_mlp(*arguments), *arguments, 255)
