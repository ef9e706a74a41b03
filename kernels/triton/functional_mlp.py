"""A whole MLP, `x [T, B, I] -> [T, B, O]`, with weights per task or shared, and its gradient.

Narrow nets run in one launch, a block of rows staying in registers from first layer to last (`net_kernel`). Others,
float64 and the gradient go layer by layer. There, what lies between two layers is kept before the activation, which is
applied on loading: the gradient needs it in that form. A layer that all tasks share entirely is computed once; where
only its weights are shared, the rows of all tasks count as those of one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta.kernels._common import (
    ACTIVATIONS,
    accumulator,
    activate,
    activation_slope,
    blocks,
    launch,
    leading_size,
    multiply_add,
    precision,
    tile,
    triton_accumulator,
)
from fastmeta.kernels._sums import sum_over_tasks, sum_rows

NARROW = 64  # widest layer that `net_kernel` takes: a wider weight does not fit into registers
SHALLOW = 8  # most layers that it takes: its code grows with them
ENOUGH_PROGRAMS = 264  # two on each multiprocessor of a large GPU


@triton.jit
def net_kernel(
    x,
    weights,
    biases,
    out,
    B,
    x_stride,
    WIDTHS: tl.constexpr,
    SIDES: tl.constexpr,
    PER_TASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """All layers for `BLOCK_B` rows of a task. WIDTHS: of the layers, the input first; SIDES: those, padded.

    PER_TASK: for every layer, whether its weights are per task, and whether its bias is.
    """
    program = tl.program_id(0).to(tl.int64)
    b_blocks = tl.cdiv(B, BLOCK_B)
    task = program // b_blocks
    b = (program % b_blocks) * BLOCK_B + tl.arange(0, BLOCK_B)
    i = tl.arange(0, SIDES[0])
    at = task * x_stride + b[:, None] * WIDTHS[0] + i[None, :]
    h = tl.load(x + at, mask=(b < B)[:, None] & (i < WIDTHS[0])[None, :], other=0).to(tl.float32)
    for layer in tl.static_range(len(PER_TASK)):
        i = tl.arange(0, SIDES[layer])
        o = tl.arange(0, SIDES[layer + 1])
        weight = weights[layer]
        if PER_TASK[layer][0]:
            weight += task * (WIDTHS[layer] * WIDTHS[layer + 1])
        at = o[None, :] * WIDTHS[layer] + i[:, None]
        mask = (o < WIDTHS[layer + 1])[None, :] & (i < WIDTHS[layer])[:, None]
        w = tl.load(weight + at, mask=mask, other=0).to(tl.float32)
        h = tl.dot(h, w, input_precision=PRECISION)
        if HAS_BIAS:
            bias = biases[layer]
            if PER_TASK[layer][1]:
                bias += task * WIDTHS[layer + 1]
            h += tl.load(bias + o, mask=o < WIDTHS[layer + 1], other=0).to(tl.float32)[None, :]
        if layer < len(PER_TASK) - 1:
            # zero beyond the width, where products of an infinity with the weights' padding are NaN
            h = tl.where((o < WIDTHS[layer + 1])[None, :], activate(h, ACTIVATION), 0.0)
    o = tl.arange(0, SIDES[len(PER_TASK)])
    at = (task * B + b)[:, None] * WIDTHS[len(PER_TASK)] + o[None, :]
    mask = (b < B)[:, None] & (o < WIDTHS[len(PER_TASK)])[None, :]
    tl.store(out + at, h.to(out.dtype.element_ty), mask=mask)


@triton.jit
def layer_kernel(
    x,
    weight,
    bias,
    out,
    B,
    IN,
    OUT,
    x_stride,
    weight_stride,
    bias_stride,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """out = activation(x) weight^T + bias, `[T, B, IN] -> [T, B, OUT]`; strides are from task to task, 0 if shared."""
    program = tl.program_id(0).to(tl.int64)
    o_blocks, b_blocks = tl.cdiv(OUT, BLOCK_O), tl.cdiv(B, BLOCK_B)
    o = (program % o_blocks) * BLOCK_O + tl.arange(0, BLOCK_O)
    b = (program // o_blocks % b_blocks) * BLOCK_B + tl.arange(0, BLOCK_B)
    task = program // o_blocks // b_blocks
    x += task * x_stride
    weight += task * weight_stride
    total = tl.zeros([BLOCK_B, BLOCK_O], ACC)
    for start in range(0, IN, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        h = tl.load(x + b[:, None] * IN + i[None, :], mask=(b < B)[:, None] & (i < IN)[None, :], other=0).to(ACC)
        w = tl.load(weight + o[None, :] * IN + i[:, None], mask=(o < OUT)[None, :] & (i < IN)[:, None], other=0)
        total = multiply_add(activate(h, ACTIVATION), w.to(ACC), total, PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + task * bias_stride + o, mask=o < OUT, other=0).to(ACC)[None, :]
    tl.store(
        out + (task * B + b)[:, None] * OUT + o[None, :],
        total.to(out.dtype.element_ty),
        mask=(b < B)[:, None] & (o < OUT)[None, :],
    )


@triton.jit
def input_bwd_kernel(
    grad,
    weight,
    before,
    out,
    B,
    IN,
    OUT,
    weight_stride,
    before_stride,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """out = (grad weight) * activation'(before), `[T, B, OUT] -> [T, B, IN]`."""
    program = tl.program_id(0).to(tl.int64)
    i_blocks, b_blocks = tl.cdiv(IN, BLOCK_I), tl.cdiv(B, BLOCK_B)
    i = (program % i_blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
    b = (program // i_blocks % b_blocks) * BLOCK_B + tl.arange(0, BLOCK_B)
    task = program // i_blocks // b_blocks
    grad += task * B * OUT
    weight += task * weight_stride
    total = tl.zeros([BLOCK_B, BLOCK_I], ACC)
    for start in range(0, OUT, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        g = tl.load(grad + b[:, None] * OUT + o[None, :], mask=(b < B)[:, None] & (o < OUT)[None, :], other=0)
        at = o.to(tl.int64)[:, None] * IN + i[None, :]
        w = tl.load(weight + at, mask=(o < OUT)[:, None] & (i < IN)[None, :], other=0)
        total = multiply_add(g.to(ACC), w.to(ACC), total, PRECISION)
    mask = (b < B)[:, None] & (i < IN)[None, :]
    if ACTIVATION != 0:
        z = tl.load(before + task * before_stride + b[:, None] * IN + i[None, :], mask=mask, other=0).to(ACC)
        total *= activation_slope(z, ACTIVATION)
    tl.store(out + (task * B + b)[:, None] * IN + i[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def weight_bwd_kernel(
    grad,
    x,
    out,
    rows,
    rows_per_part,
    B,
    IN,
    OUT,
    ACTIVATION: tl.constexpr,
    SHARED_X: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """out `[parts, OUT, IN]` = grad^T activation(x) over the part's rows of grad `[rows, OUT]`, x `[rows, IN]`.

    The rows are those of all tasks; SHARED_X: x has those of one.
    """
    program = tl.program_id(0).to(tl.int64)
    i_blocks, o_blocks = tl.cdiv(IN, BLOCK_I), tl.cdiv(OUT, BLOCK_O)
    i = (program % i_blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
    o = (program // i_blocks % o_blocks) * BLOCK_O + tl.arange(0, BLOCK_O)
    part = program // i_blocks // o_blocks
    total = tl.zeros([BLOCK_O, BLOCK_I], ACC)
    end = tl.minimum(part * rows_per_part + rows_per_part, rows)
    for start in range(part * rows_per_part, end, BLOCK_B):
        row = start + tl.arange(0, BLOCK_B)
        g = tl.load(grad + row[None, :] * OUT + o[:, None], mask=(row < end)[None, :] & (o < OUT)[:, None], other=0)
        x_row = row % B if SHARED_X else row
        h = tl.load(x + x_row[:, None] * IN + i[None, :], mask=(row < end)[:, None] & (i < IN)[None, :], other=0)
        # activation(0) of a row beyond the end meets a gradient of zero
        total = multiply_add(g.to(ACC), activate(h.to(ACC), ACTIVATION), total, PRECISION)
    tl.store(
        out + (part * OUT + o)[:, None] * IN + i[None, :],
        total.to(out.dtype.element_ty),
        mask=(o < OUT)[:, None] & (i < IN)[None, :],
    )


def _stride(t: Tensor, tasks: int) -> int:
    """From a task to the next, 0 where they share it."""
    return t.shape[1:].numel() if t.shape[0] == tasks else 0


def _sides(dtype: torch.dtype, how: str, *sizes: int) -> list[int]:
    """Sides of a tile of the result, and the step along the dimension that is summed; tl.dot takes 16 at least."""
    most = 32 if dtype == torch.float64 else 64
    step = 8 if dtype == torch.float64 else 32 if how == "tf32" else 16
    return [tile(size, side, 16) for size, side in zip(sizes, (most, most, step), strict=True)]


def _layer(x: Tensor, weight: Tensor, bias: Tensor | None, activation: int, dtype: torch.dtype) -> Tensor:
    """activation(x) weight^T + bias, with as many tasks as any of the three has, in `dtype`."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    tasks = leading_size(tensors)
    rows, width = x.shape[1:]
    out = x.new_empty(tasks, rows, weight.shape[1], dtype=dtype)
    result = out
    if x.shape[0] == tasks and all(t.shape[0] == 1 for t in tensors[1:]):
        x, out = (t.view(1, tasks * rows, t.shape[2]) for t in (x, out))
        rows, tasks = tasks * rows, 1
    how = precision(weight.dtype)
    side_b, side_o, side_i = _sides(weight.dtype, how, rows, weight.shape[1], width)
    launch(
        layer_kernel,
        tasks * blocks(rows, side_b) * blocks(weight.shape[1], side_o),
        x,
        weight,
        weight if bias is None else bias,
        out,
        rows,
        width,
        weight.shape[1],
        _stride(x, tasks),
        _stride(weight, tasks),
        0 if bias is None else _stride(bias, tasks),
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        PRECISION=how,
        ACC=triton_accumulator(weight.dtype),
        BLOCK_B=side_b,
        BLOCK_I=side_i,
        BLOCK_O=side_o,
    )
    return result


def _net(x: Tensor, weights: list[Tensor], biases: list[Tensor], activation: int, out: Tensor) -> None:
    tasks, rows = out.shape[:2]
    widths = (x.shape[2], *(w.shape[1] for w in weights))
    sides = tuple(tile(width, NARROW, 16) for width in widths)
    # a product of 64 columns of 64 takes many registers: fewer rows and more threads leave each enough
    side_b, num_warps = (16, 8) if max(sides) > 32 else (tile(rows, 32, 16), 4)
    launch(
        net_kernel,
        tasks * blocks(rows, side_b),
        x,
        tuple(weights),
        tuple(biases or weights),
        out,
        rows,
        _stride(x, tasks),
        WIDTHS=widths,
        SIDES=sides,
        PER_TASK=tuple(
            (int(w.shape[0] == tasks), int(b.shape[0] == tasks))
            for w, b in zip(weights, biases or weights, strict=True)
        ),
        HAS_BIAS=bool(biases),
        ACTIVATION=activation,
        PRECISION=precision(x.dtype),
        BLOCK_B=side_b,
        num_warps=num_warps,
    )


def functional_mlp(x: Tensor, weights: list[Tensor], biases: list[Tensor], activation: str) -> Tensor:
    kind = ACTIVATIONS.index(activation)
    tasks = leading_size([x, *weights, *biases])
    narrow = max(x.shape[2], *(w.shape[1] for w in weights)) <= NARROW and len(weights) <= SHALLOW
    if narrow and x.dtype != torch.float64:
        out = x.new_empty(tasks, x.shape[1], weights[-1].shape[1])
        _net(x, weights, biases, kind, out)
        return out
    return _before_activations(x, weights, biases, kind, len(weights), x.dtype)[-1]


def _before_activations(x, weights, biases, kind: int, count: int, last_dtype: torch.dtype) -> list[Tensor]:
    """x, and what the first `count` layers give, before their activation."""
    values = [x]
    for layer in range(count):
        dtype = last_dtype if layer == len(weights) - 1 else accumulator(x.dtype)
        bias = biases[layer] if biases else None
        values.append(_layer(values[-1], weights[layer], bias, kind if layer else 0, dtype))
    return values


def _input_gradient(grad: Tensor, weight: Tensor, before: Tensor | None, activation: int, dtype: torch.dtype) -> Tensor:
    tasks, rows, width = grad.shape
    out = grad.new_empty(tasks, rows, weight.shape[2], dtype=dtype)
    result, before = out, out if before is None else before
    if weight.shape[0] == 1 and before.shape[0] == tasks:
        grad, out, before = (t.view(1, tasks * rows, t.shape[2]) for t in (grad, out, before))
        rows, tasks = tasks * rows, 1
    how = precision(weight.dtype)
    side_b, side_i, side_o = _sides(weight.dtype, how, rows, weight.shape[2], width)
    launch(
        input_bwd_kernel,
        tasks * blocks(rows, side_b) * blocks(weight.shape[2], side_i),
        grad,
        weight,
        before,
        out,
        rows,
        weight.shape[2],
        width,
        _stride(weight, tasks),
        _stride(before, tasks),
        ACTIVATION=activation,
        PRECISION=how,
        ACC=triton_accumulator(weight.dtype),
        BLOCK_B=side_b,
        BLOCK_I=side_i,
        BLOCK_O=side_o,
    )
    return result


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, activation: int) -> Tensor:
    tasks, rows, _ = grad.shape
    OUT, IN = weight.shape[1:]
    how = precision(weight.dtype)
    side_o, side_i, side_b = _sides(weight.dtype, how, OUT, IN, rows)
    tiles = blocks(OUT, side_o) * blocks(IN, side_i)
    parts, rows_per_part = tasks, rows
    if weight.shape[0] != tasks:
        # few tiles: cut the rows into parts that are added up after, in their order
        rows_per_part = max(blocks(tasks * rows, blocks(ENOUGH_PROGRAMS, max(tiles, 1))), 4 * side_b)
        parts = max(1, blocks(tasks * rows, rows_per_part))
    final = parts == weight.shape[0]
    out = weight.new_empty(parts, OUT, IN, dtype=weight.dtype if final else accumulator(weight.dtype))
    launch(
        weight_bwd_kernel,
        parts * tiles,
        grad,
        x,
        out,
        tasks * rows,
        rows_per_part,
        rows,
        IN,
        OUT,
        ACTIVATION=activation,
        SHARED_X=x.shape[0] != tasks,
        PRECISION=how,
        ACC=triton_accumulator(weight.dtype),
        BLOCK_B=side_b,
        BLOCK_I=side_i,
        BLOCK_O=side_o,
    )
    return out if final else sum_over_tasks(out, weight.dtype)


def _bias_gradient(grad: Tensor, bias: Tensor) -> Tensor:
    if bias.shape[0] != grad.shape[0]:
        grad = grad.view(1, grad.shape[0] * grad.shape[1], grad.shape[2])
    return sum_rows(grad, bias.dtype)


def functional_mlp_bwd(
    grad: Tensor, x: Tensor, weights: list[Tensor], biases: list[Tensor], activation: str, needs: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    kind = ACTIVATIONS.index(activation)
    scratch = accumulator(x.dtype)
    before = _before_activations(x, weights, biases, kind, len(weights) - 1, scratch)
    dx = x.new_empty(0)
    d_weights, d_biases = [w.new_empty(0) for w in weights], [b.new_empty(0) for b in biases]
    for layer in reversed(range(len(weights))):
        inner = kind if layer else 0  # the input comes without activation
        if needs & 2:
            d_weights[layer] = _weight_gradient(grad, before[layer], weights[layer], inner)
        if needs & 4 and biases:
            d_biases[layer] = _bias_gradient(grad, biases[layer])
        if layer:
            grad = _input_gradient(grad, weights[layer], before[layer], inner, scratch)
        elif needs & 1:
            per_task = x.shape[0] == grad.shape[0]
            dx = _input_gradient(grad, weights[0], None, 0, x.dtype if per_task else scratch)
            dx = dx if per_task else sum_over_tasks(dx, x.dtype)
    return dx, d_weights, d_biases


def _example(new, tasks, rows, widths, shared):
    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    weights = [new(1 if shared else tasks, o, i) for i, o in pairs]
    biases = [new(1 if shared else tasks, o) for _, o in pairs]
    return new(tasks, rows, widths[-1]), new(tasks, rows, widths[0]), weights, biases


def aot(new):
    """Representative calls, for compilation ahead of time; `new(*shape)` makes a tensor."""
    # the activations that call most functions; the sine's range reduction keeps an array on the stack
    grad, *net = _example(new, 1000, 20, (1, 40, 40, 1), False)
    functional_mlp(*net, "tanh")
    functional_mlp(*net, "gelu")
    functional_mlp_bwd(grad, *net, "gelu", 7)
    grad, *net = _example(new, 32, 80, (784, 128, 5), True)
    functional_mlp(*net, "sine")
    functional_mlp_bwd(grad, *net, "sine", 7)
