"""Steps of SGD and Adam for all parameters of all tasks, and their gradients: one launch per `MOST` tensors.

As in `fast_weight_update`, elements of a tensor are numbered through all tasks, and an operand that repeats finds its
place from that number; one that is a number comes in two floats. A gradient is formed for each element, and summed
afterwards where its operand repeats, as shared gradients and learned hyper-parameters do.
"""

from __future__ import annotations

import ctypes

import triton
import triton.language as tl
from torch import Tensor

from fastmeta.kernels._common import accumulator, blocks, launch, leading_size, triton_accumulator
from fastmeta.kernels._places import mode, place
from fastmeta.kernels._sums import sum_rows

MOST = 8  # tensors in one launch: the code of the kernel grows with it
BLOCK = 1024
NUMBER = tl.constexpr(4)  # beside the modes of `_places`: the same for all tensors


@triton.jit
def _value(base, high, low, element, columns, mask, MODE: tl.constexpr, ACC: tl.constexpr):
    if MODE == NUMBER:
        # a float argument arrives in float32: its rest comes separately, for float64
        return tl.cast(high, ACC) + tl.cast(low, ACC)
    else:
        return tl.load(base + place(element, columns, MODE), mask=mask, other=0).to(ACC)


@triton.jit
def _put(out, element, value, mask, WANTED: tl.constexpr):
    if WANTED:
        tl.store(out + element, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def sgd_kernel(
    operands, outs, firsts, lengths, columns, highs, lows, MODES: tl.constexpr, WANTED: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr, NESTEROV: tl.constexpr,
    DECAYS: tl.constexpr,
):  # fmt: skip
    """operands: params, grads, buffers, rates, momenta, shares, decays; for the gradient, those of moved and buffers.
    outs: moved and buffers, or the gradients of the first seven."""
    program = tl.program_id(0)
    COUNT: tl.constexpr = 9 if GRADIENT else 7
    RESULTS: tl.constexpr = 7 if GRADIENT else 2
    for i in tl.static_range(len(MODES)):
        block = program - firsts[i]
        if (block >= 0) & (block < tl.cdiv(lengths[i], BLOCK)):
            e = block.to(INDEX) * BLOCK + tl.arange(0, BLOCK)
            mask = e < lengths[i]
            n = columns[i]
            p = _value(operands[i * COUNT], highs[0], lows[0], e, n, mask, MODES[i][0], ACC)
            g = _value(operands[i * COUNT + 1], highs[1], lows[1], e, n, mask, MODES[i][1], ACC)
            old = _value(operands[i * COUNT + 2], highs[2], lows[2], e, n, mask, MODES[i][2], ACC)
            rate = _value(operands[i * COUNT + 3], highs[3], lows[3], e, n, mask, MODES[i][3], ACC)
            momentum = _value(operands[i * COUNT + 4], highs[4], lows[4], e, n, mask, MODES[i][4], ACC)
            share = _value(operands[i * COUNT + 5], highs[5], lows[5], e, n, mask, MODES[i][5], ACC)
            decay = _value(operands[i * COUNT + 6], highs[6], lows[6], e, n, mask, MODES[i][6], ACC)
            if DECAYS:
                g += decay * p
            buffer = share * g + momentum * old
            along = buffer
            if NESTEROV:
                along = g + momentum * buffer
            if GRADIENT:
                d_moved = _value(operands[i * COUNT + 7], highs[7], lows[7], e, n, mask, MODES[i][7], ACC)
                d_buffer = _value(operands[i * COUNT + 8], highs[8], lows[8], e, n, mask, MODES[i][8], ACC)
                d_along = -rate * d_moved
                if NESTEROV:
                    d_buffer += momentum * d_along
                    d_g = share * d_buffer + d_along
                    d_momentum = d_buffer * old + d_along * buffer
                else:
                    d_buffer += d_along
                    d_g = share * d_buffer
                    d_momentum = d_buffer * old
                d_p = d_moved
                if DECAYS:
                    d_p += decay * d_g
                _put(outs[i * RESULTS], e, d_p, mask, WANTED[0])
                _put(outs[i * RESULTS + 1], e, d_g, mask, WANTED[1])
                _put(outs[i * RESULTS + 2], e, momentum * d_buffer, mask, WANTED[2])
                _put(outs[i * RESULTS + 3], e, -d_moved * along, mask, WANTED[3])
                _put(outs[i * RESULTS + 4], e, d_momentum, mask, WANTED[4])
                _put(outs[i * RESULTS + 5], e, d_buffer * g, mask, WANTED[5])
                _put(outs[i * RESULTS + 6], e, d_g * p, mask, WANTED[6])
            else:
                _put(outs[i * RESULTS], e, p - rate * along, mask, WANTED[0])
                _put(outs[i * RESULTS + 1], e, buffer, mask, WANTED[1])


@triton.jit
def adam_kernel(
    operands, outs, firsts, lengths, columns, highs, lows, MODES: tl.constexpr, WANTED: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr, DECOUPLED: tl.constexpr,
    AMSGRAD: tl.constexpr, DECAYS: tl.constexpr,
):  # fmt: skip
    """operands: params, grads, means, squares, maxima, rates, shares1, shares2, epsilons, decays; for the gradient,
    those of moved, means, squares, maxima. outs: these four, or the gradients of the first ten."""
    program = tl.program_id(0)
    COUNT: tl.constexpr = 14 if GRADIENT else 10
    RESULTS: tl.constexpr = 10 if GRADIENT else 4
    LEAST: tl.constexpr = 2.2250738585072014e-308 if ACC == tl.float64 else 1.1754943508222875e-38  # that is normal
    for i in tl.static_range(len(MODES)):
        block = program - firsts[i]
        if (block >= 0) & (block < tl.cdiv(lengths[i], BLOCK)):
            e = block.to(INDEX) * BLOCK + tl.arange(0, BLOCK)
            mask = e < lengths[i]
            n = columns[i]
            p = _value(operands[i * COUNT], highs[0], lows[0], e, n, mask, MODES[i][0], ACC)
            g = _value(operands[i * COUNT + 1], highs[1], lows[1], e, n, mask, MODES[i][1], ACC)
            old_mean = _value(operands[i * COUNT + 2], highs[2], lows[2], e, n, mask, MODES[i][2], ACC)
            old_square = _value(operands[i * COUNT + 3], highs[3], lows[3], e, n, mask, MODES[i][3], ACC)
            rate = _value(operands[i * COUNT + 5], highs[5], lows[5], e, n, mask, MODES[i][5], ACC)
            share1 = _value(operands[i * COUNT + 6], highs[6], lows[6], e, n, mask, MODES[i][6], ACC)
            share2 = _value(operands[i * COUNT + 7], highs[7], lows[7], e, n, mask, MODES[i][7], ACC)
            eps = _value(operands[i * COUNT + 8], highs[8], lows[8], e, n, mask, MODES[i][8], ACC)
            decay = _value(operands[i * COUNT + 9], highs[9], lows[9], e, n, mask, MODES[i][9], ACC)
            if DECAYS and not DECOUPLED:
                g += decay * p
            mean = old_mean + share1 * (g - old_mean)
            square = old_square + share2 * (g * g - old_square)
            largest = square
            if AMSGRAD:
                maximum = _value(operands[i * COUNT + 4], highs[4], lows[4], e, n, mask, MODES[i][4], ACC)
                largest = tl.where(maximum <= square, square, maximum)
                largest = tl.where(square != square, square, largest)  # NaN stays, of either
            root = tl.sqrt(tl.where(largest < LEAST, LEAST, largest))
            if GRADIENT:
                d_moved = _value(operands[i * COUNT + 10], highs[10], lows[10], e, n, mask, MODES[i][10], ACC)
                d_mean = _value(operands[i * COUNT + 11], highs[11], lows[11], e, n, mask, MODES[i][11], ACC)
                d_square = _value(operands[i * COUNT + 12], highs[12], lows[12], e, n, mask, MODES[i][12], ACC)
                inverse = 1 / (root + eps)
                along = mean * inverse
                d_along = -rate * d_moved * inverse  # of the mean
                d_below = -d_along * along  # of root + eps
                d_mean += d_along
                # at 0 the root's slope counts as 0: what it would multiply is
                d_largest = d_below * tl.where(largest < LEAST, 0.0, 0.5 / root)
                d_maximum = d_largest * 0
                if AMSGRAD:  # a tie counts half for each, as in torch
                    d_largest += _value(operands[i * COUNT + 13], highs[13], lows[13], e, n, mask, MODES[i][13], ACC)
                    half = 0.5 * d_largest
                    zero = d_largest * 0
                    d_maximum = tl.where(maximum > square, d_largest, tl.where(maximum == square, half, zero))
                    d_largest = tl.where(maximum > square, zero, tl.where(maximum == square, half, d_largest))
                d_square += d_largest
                d_g = share1 * d_mean + 2 * share2 * g * d_square
                d_p = d_moved
                d_decay = d_g * p
                if DECOUPLED:
                    d_decay = -d_moved * p
                    d_p -= decay * d_moved
                elif DECAYS:
                    d_p += decay * d_g
                _put(outs[i * RESULTS], e, d_p, mask, WANTED[0])
                _put(outs[i * RESULTS + 1], e, d_g, mask, WANTED[1])
                _put(outs[i * RESULTS + 2], e, d_mean - share1 * d_mean, mask, WANTED[2])
                _put(outs[i * RESULTS + 3], e, d_square - share2 * d_square, mask, WANTED[3])
                _put(outs[i * RESULTS + 4], e, d_maximum, mask, WANTED[4])
                _put(outs[i * RESULTS + 5], e, -d_moved * along, mask, WANTED[5])
                _put(outs[i * RESULTS + 6], e, d_mean * (g - old_mean), mask, WANTED[6])
                _put(outs[i * RESULTS + 7], e, d_square * (g * g - old_square), mask, WANTED[7])
                _put(outs[i * RESULTS + 8], e, d_below, mask, WANTED[8])
                _put(outs[i * RESULTS + 9], e, d_decay, mask, WANTED[9])
            else:
                start = p
                if DECAYS and DECOUPLED:
                    start = p - decay * p
                _put(outs[i * RESULTS], e, start - rate * (mean / (root + eps)), mask, WANTED[0])
                _put(outs[i * RESULTS + 1], e, mean, mask, WANTED[1])
                _put(outs[i * RESULTS + 2], e, square, mask, WANTED[2])
                _put(outs[i * RESULTS + 3], e, largest, mask, WANTED[3])


def _step(kernel, lists: list, numbers: list[float], outs: list[list[Tensor]], params: list[Tensor], **flags) -> None:
    """Every list has a tensor for each parameter or none, then its number holds; `outs` are whole, or not wanted."""
    tasks = leading_size([t for of in lists for t in of])
    sizes = [p.shape[1] for p in params]
    highs = tuple(ctypes.c_float(number).value for number in numbers)
    lows = tuple(number - high for number, high in zip(numbers, highs, strict=True))
    for start in range(0, len(params), MOST):
        chosen = [i for i in range(start, min(start + MOST, len(params))) if tasks * sizes[i]]
        if not chosen:
            continue
        lengths = [tasks * sizes[i] for i in chosen]
        firsts, programs = [], 0
        for length in lengths:
            firsts.append(programs)
            programs += blocks(length, BLOCK)
        launch(
            kernel,
            programs,
            tuple((of or params)[i] for i in chosen for of in lists),
            tuple((of or params)[i] for i in chosen for of in outs),
            tuple(firsts),
            tuple(lengths),
            tuple(sizes[i] for i in chosen),
            highs,
            lows,
            MODES=tuple(
                tuple(mode(of[i], tasks, sizes[i]) if of else NUMBER.value for of in lists) for i in chosen
            ),
            WANTED=tuple(bool(of) for of in outs),
            ACC=triton_accumulator(params[0].dtype),
            INDEX=tl.int64 if max(lengths) > 2**31 - 1 - BLOCK else tl.int32,
            BLOCK=BLOCK,
            **flags,
        )


def _forward(kernel, lists, numbers, wanted: list[bool], **flags) -> tuple[list[Tensor], ...]:
    tasks, params = leading_size([t for of in lists for t in of]), lists[0]
    outs = [[p.new_empty(tasks, p.shape[1]) for p in params] if want else [] for want in wanted]
    _step(kernel, lists, numbers, outs, params, GRADIENT=False, **flags)
    return tuple(outs)


def _backward(kernel, grads, lists, numbers, needs: int, **flags) -> tuple[list[Tensor], ...]:
    tasks, params = leading_size([t for of in (*lists, *grads) for t in of]), lists[0]

    def each(of):  # summed afterwards, if it is not whole
        for t, p in zip(of, params, strict=False):  # there may be none
            whole = t.shape == (tasks, p.shape[1])
            yield p.new_empty(tasks, p.shape[1], dtype=p.dtype if whole else accumulator(p.dtype))

    outs = [list(each(of)) if needs >> bit & 1 else [] for bit, of in enumerate(lists)]
    read = params if flags["DECAYS"] else []  # for the sake of their decay alone
    _step(kernel, [read, *lists[1:], *grads], [*numbers, *[0.0] * len(grads)], outs, params, GRADIENT=True, **flags)
    return tuple(
        [_summed(d, t) for d, t in zip(out, of, strict=True)] if needs >> bit & 1 else [t.new_empty(0) for t in of]
        for bit, (out, of) in enumerate(zip(outs, lists, strict=True))
    )


def _summed(value: Tensor, like: Tensor) -> Tensor:
    tasks, columns = value.shape
    if like.shape == value.shape:
        return value
    if like.shape[1] != columns:
        columns, value = 1, sum_rows(value.view(tasks, columns, 1), value.dtype)
    if like.shape[0] != tasks:
        value = sum_rows(value.view(1, tasks, columns), value.dtype)
    return value.to(like.dtype)


def _of_sgd(args) -> tuple:
    lists, numbers = args[:7], args[7:11]
    flags = {"NESTEROV": args[11], "DECAYS": bool(lists[-1]) or numbers[-1] != 0}
    return lists, [0.0] * 3 + list(numbers), flags


def sgd_step(*args) -> tuple[list[Tensor], ...]:
    lists, numbers, flags = _of_sgd(args)
    return _forward(sgd_kernel, lists, numbers, [True, args[-1]], **flags)


def sgd_step_bwd(*args) -> tuple[list[Tensor], ...]:
    lists, numbers, flags = _of_sgd(args[2:-1])
    return _backward(sgd_kernel, args[:2], lists, numbers, args[-1], **flags)


def _of_adam(args) -> tuple:
    lists, numbers = args[:10], args[10:15]
    flags = {"DECOUPLED": args[15], "AMSGRAD": args[16], "DECAYS": bool(lists[-1]) or numbers[-1] != 0}
    return lists, [0.0] * 4 + [-1.0, *numbers], flags  # a maximum before the first is less than every square


def adam_step(*args) -> tuple[list[Tensor], ...]:
    lists, numbers, flags = _of_adam(args)
    return _forward(adam_kernel, lists, numbers, [True, True, True, args[-1]], **flags)


def adam_step_bwd(*args) -> tuple[list[Tensor], ...]:
    lists, numbers, flags = _of_adam(args[4:-1])
    return _backward(adam_kernel, args[:4], lists, numbers, args[-1], **flags)


def aot(new):
    """Representative calls, for compilation ahead of time; `new(*shape)` makes a tensor."""
    sizes = (1600, 1)
    of, element, one = ([new(rows, n) for n in ns] for rows, ns in ((1000, sizes), (1, sizes), (1, (1, 1))))
    sgd, adam = (sgd_step, sgd_step_bwd, 1, 4, 2), (adam_step, adam_step_bwd, 3, 5, 4)
    for step, backward, states, hyper, outputs in (sgd, adam):
        step(*[of] * (2 + states), *[[]] * hyper, *[0.1] * hyper, False, True)
        lists = [element, *[of] * (1 + states), one, element, *[one] * (hyper - 2)]
        backward(*[of] * outputs, *lists, *[0.0] * hyper, True, True, 2 ** len(lists) - 1)
