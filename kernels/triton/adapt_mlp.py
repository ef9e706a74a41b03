"""Fast weights of every task after `K` inner steps, and their gradient: a program takes one task after the other."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmeta.kernels.inner_loop.call import Call, Wants
from fastmeta.kernels.inner_loop.examples import examples
from fastmeta.kernels.inner_loop.products import copy_state
from fastmeta.kernels.inner_loop.task import begin_program, go_back, take_steps


@triton.jit
def adapt_kernel(support, out, memory, problem, HOW: tl.constexpr):
    """out `[T, P]`: the adapted states."""
    sizes, places = problem.sizes, problem.places
    program = tl.program_id(0).to(tl.int64)
    memory += program * places.size
    begin_program(memory, problem, HOW)
    for task in range(program, sizes.tasks, tl.num_programs(0)):
        adapted = take_steps(task, memory, support, problem, HOW)
        copy_state(adapted, out + task * places.state, places.state, HOW)


@triton.jit
def adapt_bwd_kernel(grad, support, d_support, sums, memory, problem, HOW: tl.constexpr):
    """Adds what `grad` `[T, P]`, of the adapted states, gives to `d_support` and `sums`."""
    sizes, places = problem.sizes, problem.places
    program = tl.program_id(0).to(tl.int64)
    memory += program * places.size
    begin_program(memory, problem, HOW)
    for task in range(program, sizes.tasks, tl.num_programs(0)):
        tl.debug_barrier()  # the task before may still be read
        copy_state(grad + task * places.state, memory + places.adjoint, places.state, HOW)
        if HOW.SWEEPS:
            take_steps(task, memory, support, problem, HOW)
        go_back(task, program, memory, support, problem, d_support, sums, HOW)


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
    call.launch(adapt_kernel, call.support.pointers, out)
    return call.fast_weights(out)


def adapt_mlp_bwd(*args) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor, list[Tensor]]:
    call = _backward_call(args)
    d_support, sums = call.support.gradients(args[-1], 0, 1), call.new_sums()
    grad = call.state(*args[:3]).expand(call.tasks, -1).contiguous()
    wants_input, wants_base = d_support.wanted
    call.launch(
        adapt_bwd_kernel,
        grad,
        call.support.pointers,
        d_support.pointers,
        sums,
        WANTS_INPUT=wants_input,
        WANTS_BASE=wants_base,
    )
    return d_support.x, d_support.gram, *call.split(sums)


def aot(new):
    """Representative calls, for compilation ahead of time; `new(*shape)` makes a tensor."""
    for support, _, rest in examples(new):
        grads = adapt_mlp(*support, *rest)
        adapt_mlp_bwd(*grads, *support, *rest, 63)
