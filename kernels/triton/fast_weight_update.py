"""`out = params - lr * grads` for all parameters of all tasks, and its gradient: one launch per `MOST` tensors.

Elements of a tensor are numbered through all tasks, so that a bias of one element and a matrix of a million fill the
same blocks; an operand that is shared or has fewer elements finds its place from that number.
"""

from __future__ import annotations

import ctypes

import triton
import triton.language as tl
from torch import Tensor

from fastmeta.kernels._common import accumulator, blocks, launch, leading_size, tile, triton_accumulator, warps
from fastmeta.kernels._places import ONE, mode, place
from fastmeta.kernels._sums import sum_over_tasks

MOST = 16  # tensors in one launch: the code of the kernel grows with it
BLOCK = 1024


@triton.jit
def update_kernel(
    bases,
    others,
    rates,
    outs,
    firsts,
    lengths,
    columns,
    rate_high,
    rate_low,
    MODES: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_RATE: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """outs[i] = bases[i] - rates[i] * others[i], all arguments but the rate in two floats being tuples over tensors."""
    program = tl.program_id(0)
    for i in tl.static_range(len(MODES)):
        block = program - firsts[i]
        if (block >= 0) & (block < tl.cdiv(lengths[i], BLOCK)):
            element = block.to(INDEX) * BLOCK + tl.arange(0, BLOCK)
            mask = element < lengths[i]
            value = tl.load(others[i] + place(element, columns[i], MODES[i][1]), mask=mask, other=0).to(ACC)
            if HAS_RATE:
                value *= tl.load(rates[i] + place(element, columns[i], MODES[i][2]), mask=mask, other=0).to(ACC)
            else:
                # a float argument arrives in float32: its rest comes separately, for float64
                value *= tl.cast(rate_high, ACC) + tl.cast(rate_low, ACC)
            if HAS_BASE:
                base = tl.load(bases[i] + place(element, columns[i], MODES[i][0]), mask=mask, other=0).to(ACC)
                value = base - value
            else:
                value = -value
            tl.store(outs[i] + element, value.to(outs[i].dtype.element_ty), mask=mask)


@triton.jit
def row_products_kernel(left, right, out, columns, right_stride, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = -sum of left[t] * right[t]; `right_stride` 0 where the tasks share `right`."""
    task = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], ACC)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < columns
        a = tl.load(left + task * columns + column, mask=mask, other=0).to(ACC)
        b = tl.load(right + task * right_stride + column, mask=mask, other=0).to(ACC)
        total += a * b
    tl.store(out + task, (-tl.sum(total, 0)).to(out.dtype.element_ty))


def _update(bases, others, rates, lr: float, tasks: int, sizes: list[int], outs: list[Tensor]) -> None:
    """outs[i] = bases[i] - rates[i] * others[i]; bases or rates may be empty lists: 0, and `lr`."""
    high = ctypes.c_float(lr).value
    for start in range(0, len(outs), MOST):
        chosen = [i for i in range(start, min(start + MOST, len(outs))) if outs[i].numel()]
        if not chosen:
            continue
        lengths = [outs[i].numel() for i in chosen]
        firsts, programs = [], 0
        for length in lengths:
            firsts.append(programs)
            programs += blocks(length, BLOCK)
        modes = tuple(
            tuple(mode(group[i], tasks, sizes[i]) if group else ONE.value for group in (bases, others, rates))
            for i in chosen
        )
        wide = max(lengths) > 2**31 - 1 - BLOCK
        launch(
            update_kernel,
            programs,
            tuple((bases or others)[i] for i in chosen),
            tuple(others[i] for i in chosen),
            tuple((rates or others)[i] for i in chosen),
            tuple(outs[i] for i in chosen),
            tuple(firsts),
            tuple(lengths),
            tuple(sizes[i] for i in chosen),
            high,
            lr - high,
            MODES=modes,
            HAS_BASE=bool(bases),
            HAS_RATE=bool(rates),
            ACC=triton_accumulator(outs[chosen[0]].dtype),
            INDEX=tl.int64 if wide else tl.int32,  # dividing wide integers takes longer than the memory does
            BLOCK=BLOCK,
        )


def fast_weight_update(params: list[Tensor], grads: list[Tensor], lrs: list[Tensor], lr: float) -> list[Tensor]:
    tasks = leading_size([*params, *grads, *lrs])
    sizes = [p.shape[1] for p in params]
    outs = [p.new_empty(tasks, n) for p, n in zip(params, sizes, strict=True)]
    _update(params, grads, lrs, lr, tasks, sizes, outs)
    return outs


def fast_weight_update_bwd(
    grad_outs: list[Tensor], grads: list[Tensor], lrs: list[Tensor], lr: float, needs: int
) -> tuple[list[Tensor], list[Tensor]]:
    tasks = leading_size([*grad_outs, *grads, *lrs])
    sizes = [g.shape[1] for g in grad_outs]
    d_grads = [g.new_empty(0) for g in grads]
    d_lrs = [rate.new_empty(0) for rate in lrs]
    if needs & 1:
        # what is summed over the tasks is formed per task first
        d_grads = [_per_task(out, g.shape[0] == tasks) for out, g in zip(grad_outs, grads, strict=True)]
        _update([], grad_outs, lrs, lr, tasks, sizes, d_grads)
        d_grads = [_summed(d, g) for d, g in zip(d_grads, grads, strict=True)]
    if needs & 2 and lrs:
        whole = [i for i, rate in enumerate(lrs) if rate.shape[1] == sizes[i]]
        for i in whole:
            d_lrs[i] = _per_task(grad_outs[i], lrs[i].shape[0] == tasks)
        pick = [[group[i] for i in whole] for group in (grad_outs, grads, sizes, d_lrs)]
        _update([], pick[0], pick[1], lr, tasks, pick[2], pick[3])
        for i in set(range(len(lrs))).difference(whole):
            d_lrs[i] = _row_products(grad_outs[i], grads[i], lrs[i].shape[0] == tasks)
        d_lrs = [_summed(d, rate) for d, rate in zip(d_lrs, lrs, strict=True)]
    return d_grads, d_lrs


def _per_task(out: Tensor, final: bool, columns: int | None = None) -> Tensor:
    shape = out.shape if columns is None else (out.shape[0], columns)
    return out.new_empty(shape, dtype=out.dtype if final else accumulator(out.dtype))


def _row_products(out: Tensor, grad: Tensor, final: bool) -> Tensor:
    tasks, columns = out.shape
    result = _per_task(out, final, 1)
    side = tile(columns, BLOCK)
    launch(
        row_products_kernel,
        tasks,
        out,
        grad,
        result,
        columns,
        columns if grad.shape[0] == tasks else 0,
        ACC=triton_accumulator(out.dtype),
        BLOCK=side,
        num_warps=warps(side),
    )
    return result


def _summed(value: Tensor, like: Tensor) -> Tensor:
    return value if value.shape[0] == like.shape[0] else sum_over_tasks(value, like.dtype)


def programs(tasks: int, sizes: list[int]) -> int:
    """At least as many as the largest grid has."""
    return max(tasks, sum(blocks(tasks * n, BLOCK) for n in sizes))


def _example(new, tasks, shared, rate):
    sizes = (1600, 40, 1)
    params = [new(1 if "p" in shared else tasks, n) for n in sizes]
    grads = [new(1 if "g" in shared else tasks, n) for n in sizes]
    rates = {"": None, "one": (1, False), "task": (tasks, False), "element": (1, True)}[rate]
    lrs = [new(rates[0], n if rates[1] else 1) for n in sizes] if rates else []
    return params, grads, lrs, [new(tasks, n) for n in sizes]


def aot(new):
    """Representative calls, for compilation ahead of time; `new(*shape)` makes a tensor."""
    for shared, rate in (("p", ""), ("", "element"), ("g", "one")):
        params, grads, lrs, outs = _example(new, 1000, shared, rate)
        fast_weight_update(params, grads, lrs, 0.1)
        fast_weight_update_bwd(outs, grads, lrs, 0.1, 3)
