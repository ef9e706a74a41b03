"""Layers for all tasks at once: torch's functions answered by ops that take every task's own weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..functional import torch_calls
from ..functional.autocast import cast
from ..functional.blocks import Block
from ..ops.task_conv2d import SPEC as CONVOLUTION
from ..ops.task_conv2d import out_size
from ._blocks import BlockTensor, Pending, PixelTensor, pending, pixels_of
from ._task_tensor import RULES, TaskTensor, mapped, rule, values_of

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# products and convolutions ---------------------------------------------------------------------------------------


def _rowwise(tensor: Tensor) -> Tensor:
    """What op level takes: a task dimension, of size 1 where the tasks share it."""
    return tensor.values if isinstance(tensor, TaskTensor) else tensor.unsqueeze(0)


@rule(F.linear)
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> TaskTensor:
    x, w = values_of(input), values_of(weight)
    if not isinstance(weight, TaskTensor):
        if not isinstance(bias, TaskTensor):
            return TaskTensor(F.linear(x, w, bias))
        y = F.linear(x, w)
    else:
        rows = x.flatten(1, -2) if isinstance(input, TaskTensor) else x.reshape(-1, x.shape[-1])
        if isinstance(input, TaskTensor) and x.dim() == 2:
            rows = x.unsqueeze(1)
        if isinstance(bias, TaskTensor) and isinstance(input, TaskTensor):
            y = torch.baddbmm(bias.values.unsqueeze(1), rows, w.mT)
            bias = None
        else:
            y = torch.matmul(rows, w.mT)
        y = y.view(y.shape[0], *input.shape[:-1], w.shape[1])
    if isinstance(bias, TaskTensor):
        bias = bias.values.view(len(bias.values), *[1] * (y.dim() - 2), -1)
    return TaskTensor(y if bias is None else y + bias)


def _convolution(dims: int, plain: Callable) -> Callable:
    def answer(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        sizes = weight.shape[2:]
        uneven = padding == "same" and any(k % 2 == 0 for k in sizes)
        if uneven or input.dim() != dims + 2 or weight.dtype not in _FLOATS:
            options = dict(bias=bias, stride=stride, padding=padding, dilation=dilation, groups=groups)
            return mapped(plain, (input, weight), options)
        stride, dilation = _spread(stride, dims), _spread(dilation, dims)
        if padding == "same":
            padding = [d * (k - 1) // 2 for d, k in zip(dilation, sizes, strict=True)]
        padding = _spread(0 if padding == "valid" else padding, dims)
        given = zip(input.shape[2:], sizes, stride, padding, dilation, strict=True)
        if any(out_size(*of_dim) < 1 for of_dim in given) or input.shape[1] != weight.shape[1] * groups:
            options = dict(bias=bias, stride=stride, padding=padding, dilation=dilation, groups=groups)
            return mapped(plain, (input, weight), options)  # torch says what is wrong
        if dims == 1:
            stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
        w = _rowwise(weight)
        bias = [] if bias is None else [_rowwise(bias)]
        if dims == 1:
            w = w.unsqueeze(3)
        x, w, *bias = cast("lower", pixels_of(input), w, *bias)
        y = CONVOLUTION(x, w, bias, *stride, *padding, *dilation, groups)
        return PixelTensor(y, torch.Size((y.shape[1], y.shape[4], *y.shape[4 - dims : 4])))

    return answer


def _spread(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * dims if len(value) == 1 else value


RULES[torch.conv1d] = _convolution(1, torch.conv1d)
RULES[torch.conv2d] = _convolution(2, torch.conv2d)

# norms, activations, pools ---------------------------------------------------------------------------------------


def _optional(tensor: Tensor | None) -> list[Tensor]:
    return [] if tensor is None else [_rowwise(tensor)]


def _images(input: Tensor) -> Tensor | None:
    """The pixels of all tasks' `[B, C]`, `[B, C, L]` or `[B, C, H, W]`; None for what a block does not take."""
    if not isinstance(input, TaskTensor) or not 2 <= input.dim() <= 4 or input.dtype not in _FLOATS:
        return None
    return pixels_of(input) if input.dim() > 2 else input.values[:, :, None, None]


def _normed(
    input: TaskTensor, pixels: Tensor, weight, bias, norm: str, groups: int, eps: float, running=None
) -> BlockTensor:
    weight, bias = _optional(weight), _optional(bias)
    x, *affine = cast("widest", pixels, *weight, *bias)
    # contiguous once, and not in every kernel
    block = Block.of_pixels(x.contiguous(), affine[: len(weight)], affine[len(weight) :], norm, groups, running, eps)
    return BlockTensor(Pending(block), input.shape)


@rule(F.batch_norm)
def _batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
) -> TaskTensor:
    x = _images(input)
    if x is None:
        args = (input, running_mean, running_var, weight, bias, training, momentum, eps)
        return mapped(F.batch_norm, args, {})
    if not training:
        running = [_rowwise(m) for m in (running_mean, running_var)]
        return _normed(input, x, weight, bias, "batch", 1, eps, running)
    rows = x.shape[1:4].numel()
    if rows <= 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
    found = _normed(input, x, weight, bias, "batch", 1, eps)
    if running_mean is not None:
        mean, var = (m.squeeze(1) for m in found.pending.block.moments)
        _run_on(running_mean, mean, momentum)
        _run_on(running_var, var, momentum, rows / (rows - 1))
    return found


def _run_on(running: Tensor, value: Tensor, momentum: float, factor: float = 1.0) -> None:
    """A running statistic, which `forward` writes into."""
    if not isinstance(running, TaskTensor):
        raise NotImplementedError("a batch norm that writes running statistics which the tasks share")
    running.values.mul_(1 - momentum).add_(value, alpha=momentum * factor)


@rule(F.group_norm, torch.group_norm)
def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True) -> TaskTensor:
    x = _images(input)
    if x is None or input.dim() < 3 or x.shape[2:].numel() // num_groups <= 1:
        return mapped(F.group_norm, (input, num_groups, weight, bias, eps), {})
    return _normed(input, x, weight, bias, "group", num_groups, eps)


@rule(F.instance_norm)
def _instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
) -> TaskTensor:
    x = _images(input)
    if x is None or input.dim() < 3 or running_mean is not None or not use_input_stats or x.shape[2:4].numel() <= 1:
        args = (input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
        return mapped(F.instance_norm, args, {})
    return _normed(input, x, weight, bias, "instance", 1, eps)


def _open_block(input: TaskTensor) -> Pending | None:
    """The block to which a layer behind `input` may be added: one that has not run, or a new one of images."""
    found = pending(input)
    if found is None and input.dim() == 4 and input.dtype in _FLOATS:
        pixels = pixels_of(input)
        if pixels.is_contiguous():
            return Pending(Block.of_pixels(pixels, [], [], "none", 1, None, 0.0))
    return found


def _activated(
    func: Callable, input: TaskTensor, activation: str, slope: float = 0.0, *, in_place: bool = False
) -> TaskTensor:
    block = _open_block(input)
    after = None if block is None else block.with_follow(block.follow.activated(activation, slope))
    if after is None:
        return input.become(func(input.values)) if in_place else TaskTensor(func(input.values))
    if in_place and pending(input) is not None:
        input.pending = after
        return input
    found = BlockTensor(after, input.shape)
    return input.become(found.values) if in_place else found


def _activation(func: Callable, activation: str, in_place: bool = False) -> Callable:
    def answer(input, inplace=False):
        return _activated(func, input, activation, in_place=inplace or in_place)

    return answer


RULES[F.relu] = RULES[torch.relu] = RULES[Tensor.relu] = _activation(torch.relu, "relu")
RULES[torch.relu_] = RULES[Tensor.relu_] = _activation(torch.relu, "relu", in_place=True)
RULES[F.silu] = _activation(F.silu, "silu")


@rule(F.gelu)
def _gelu(input, approximate="none"):
    if approximate != "none":
        return TaskTensor(F.gelu(input.values, approximate=approximate))
    return _activated(F.gelu, input, "gelu")


@rule(F.leaky_relu)
def _leaky_relu(input, negative_slope=0.01, inplace=False):
    def func(x: Tensor) -> Tensor:
        return F.leaky_relu(x, negative_slope)

    return _activated(func, input, "leaky_relu", negative_slope, in_place=inplace)


def _pool(plain: Callable) -> Callable:
    def answer(input, *args, **kwargs):
        asked = torch_calls.POOLS[plain](input, *args, **kwargs)
        found = None if asked is None else _pooled(input, **asked)
        return _folded(plain)(input, *args, **kwargs) if found is None else found

    return answer


def _pooled(input: TaskTensor, pool: str) -> TaskTensor | None:
    block = _open_block(input) if input.dim() == 4 and min(input.shape[2:]) >= 2 else None
    after = None if block is None else block.with_follow(block.follow.pooled(pool))
    if after is None:
        return None
    rows, channels, height, width = input.shape
    return BlockTensor(after, torch.Size((rows, channels, height // 2, width // 2)))


RULES[torch.max_pool2d] = RULES[F.max_pool2d] = _pool(F.max_pool2d)
RULES[F.avg_pool2d] = _pool(F.avg_pool2d)


def _folded(func: Callable) -> Callable:
    """Functions of each row by itself, whose rows may be those of all tasks."""

    def answer(input: Tensor, *args, **kwargs) -> Any:
        if not isinstance(input, TaskTensor) or input.dim() < 3:
            return mapped(func, (input, *args), kwargs)
        values = input.values
        found = func(values.flatten(0, 1), *args, **kwargs)
        parts = found if isinstance(found, tuple) else (found,)
        made = tuple(TaskTensor(part.unflatten(0, values.shape[:2])) for part in parts)
        return made if isinstance(found, tuple) else made[0]

    return answer


for _func in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.adaptive_avg_pool1d, F.interpolate,
              torch.adaptive_avg_pool1d, torch.max_pool1d, F.avg_pool1d):  # fmt: skip
    RULES[_func] = _folded(_func)


# shapes ----------------------------------------------------------------------------------------------------------


@rule(torch.flatten, Tensor.flatten)
def _flatten(input, start_dim=0, end_dim=-1):
    rank = input.dim()
    return TaskTensor(input.values.flatten(start_dim % rank + 1, end_dim % rank + 1)) if rank else mapped(
        torch.flatten, (input,), {}
    )


@rule(Tensor.view, Tensor.reshape)
def _view(input, *shape):
    if len(shape) == 1 and not isinstance(shape[0], (int, Tensor)):
        if isinstance(shape[0], torch.dtype):
            return mapped(Tensor.view, (input, *shape), {})
        shape = tuple(shape[0])
    return TaskTensor(input.values.reshape(input.values.shape[0], *shape))


@rule(torch.reshape)
def _reshape(input, shape):
    return _view(input, *shape)


@rule(F.dropout)
def _dropout(input, p=0.5, training=True, inplace=False):
    return TaskTensor(F.dropout(input.values, p, training)) if training and p else input
