"""The query loss of every task after `K` inner steps, and its gradient: a program takes one task after the other."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmeta.kernels.inner_loop.call import Call, Wants
from fastmeta.kernels.inner_loop.examples import examples
from fastmeta.kernels.inner_loop.query import query_backward, query_loss, query_net
from fastmeta.kernels.inner_loop.task import begin_program, go_back, take_steps


@triton.jit
def meta_loss_kernel(support, query, losses, logits, memory, problem, HOW: tl.constexpr):
    """losses `[T]`, logits `[T, Q, C]`."""
    program = tl.program_id(0).to(tl.int64)
    memory += program * problem.places.size
    begin_program(memory, problem, HOW)
    for task in range(program, problem.sizes.tasks, tl.num_programs(0)):
        adapted = take_steps(task, memory, support, problem, HOW)
        run, targets = query_net(task, memory, adapted, query, problem, HOW)
        query_loss(task, run, targets, losses, logits, HOW)


@triton.jit
def meta_loss_bwd_kernel(
    grad_losses, grad_logits, support, query, d_support, d_query, sums, memory, problem, HOW: tl.constexpr
):
    """Adds what the gradients of losses `[T]` and logits `[T, Q, C]` give to `d_support`, `d_query` and `sums`."""
    program = tl.program_id(0).to(tl.int64)
    memory += program * problem.places.size
    begin_program(memory, problem, HOW)
    for task in range(program, problem.sizes.tasks, tl.num_programs(0)):
        adapted = take_steps(task, memory, support, problem, HOW)
        run, targets = query_net(task, memory, adapted, query, problem, HOW)
        query_backward(task, run, targets, grad_losses, grad_logits, d_query, problem, HOW)
        go_back(task, program, memory, support, problem, d_support, sums, HOW)


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
    call.launch(meta_loss_kernel, call.support.pointers, call.query.pointers, losses, logits)
    return losses, logits


def meta_loss_mlp_bwd(*args) -> tuple:
    call, needs = _backward_call(args), args[-1]
    d_support, d_query = call.support.gradients(needs, 0, 2), call.query.gradients(needs, 1, 3)
    sums = call.new_sums()
    wants_input, wants_base = d_support.wanted
    wants_query_input, wants_query_base = d_query.wanted
    call.launch(
        meta_loss_bwd_kernel,
        *args[:2],
        call.support.pointers,
        call.query.pointers,
        d_support.pointers,
        d_query.pointers,
        sums,
        WANTS_INPUT=wants_input,
        WANTS_BASE=wants_base,
        WANTS_QUERY_INPUT=wants_query_input,
        WANTS_QUERY_BASE=wants_query_base,
    )
    return d_support.x, d_query.x, d_support.gram, d_query.gram, *call.split(sums)


def aot(new):
    """Representative calls, for compilation ahead of time; `new(*shape)` makes a tensor."""
    for (*support, gram_support), (*query, gram_query), rest in examples(new):
        arguments = *support, *query, gram_support, gram_query, *rest
        meta_loss_mlp_bwd(*meta_loss_mlp(*arguments), *arguments, 255)
