"""A whole MLP, `x [T, B, I] -> [T, B, O]`, with weights per task or shared, and its gradient.

Narrow nets run in one launch, a block of rows staying in registers from first layer to last (`net_kernel`). Others,
float64 and the gradient go layer by layer (`_layers.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta.kernels._common import ACTIVATIONS, accumulator, activate, blocks, launch, leading_size, tf32, tile
from fastmeta.kernels._layers import bias_gradient, input_gradient, layer_outputs, stride, weight_gradient
from fastmeta.kernels._sums import sum_over_tasks

NARROW = 64  # widest layer that `net_kernel` takes: a wider weight does not fit into registers
SHALLOW = 8  # most layers that it takes: its code grows with them


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
    TF32: tl.constexpr,
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
        h = tl.dot(h, w, input_precision="tf32" if TF32 else "ieee")
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
        stride(x, tasks),
        WIDTHS=widths,
        SIDES=sides,
        PER_TASK=tuple(
            (int(w.shape[0] == tasks), int(b.shape[0] == tasks))
            for w, b in zip(weights, biases or weights, strict=True)
        ),
        HAS_BIAS=bool(biases),
        ACTIVATION=activation,
        TF32=tf32(x.dtype),
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
        values.append(layer_outputs(values[-1], weights[layer], bias, kind if layer else 0, dtype))
    return values


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
            d_weights[layer] = weight_gradient(grad, before[layer], weights[layer], inner)
        if needs & 4 and biases:
            d_biases[layer] = bias_gradient(grad, biases[layer])
        if layer:
            grad = input_gradient(grad, weights[layer], before[layer], inner, scratch)
        elif needs & 1:
            per_task = x.shape[0] == grad.shape[0]
            dx = input_gradient(grad, weights[0], None, 0, x.dtype if per_task else scratch)
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
