"""A convolutional encoder with its norms, activations and pools in one pass each, and its convolutions by tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from fastmeta.dispatch import native, tuned
from fastmeta.dispatch.library import plain_call
from fastmeta.functional.blocks import Block, Follow
from fastmeta.functional.torch_calls import ACTIVATIONS, POOLS
from fastmeta.ops import task_conv2d

_DTYPES = (torch.float32, torch.float64)
# Numbers in a norm's input below which the calls cost more than the passes over memory. A training step of conv4-64 on
# 28x28 images in process time (AVX2, one thread): of 120 images 136 ms against 191; of 5, whose largest has 250,000,
# 8.4 against 7.8.
_LEAST = 512 * 1024
# Numbers in a convolution's images or outputs, whichever has more, from which the op is faster than torch (AVX2, one
# thread, forward and backward): 1.6 times for 120 images of 14x14 and 64 channels, 1.3 for 7x7; as fast for 5 of 14x14.
_LEAST_OF_CONVOLUTION = 250_000


def call(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """`module(*args, **kwargs)`; where it is an `nn.Sequential` of torch's own layers on a CPU, batch norms in it run
    together with the activation and the 2x2 pool that follow, forward and backward in one pass each, and convolutions
    of 3x3 taps as `fastmeta.functional.task_conv2d` of one task.

    Images must lie channels last, as in `fastmeta.nn.conv4`, and be large enough that it pays. Values, gradients and
    running statistics are those of the layers one after the other. What could notice goes to torch: hooks, layers of a
    class of one's own, transforms, autocast, compilation.
    """
    if kwargs or len(args) != 1 or type(module) is not nn.Sequential or not _served(args[0]):
        return module(*args, **kwargs)
    layers = _layers(module)
    if layers is None or not any(type(layer) is nn.BatchNorm2d for layer in layers):
        return module(*args)
    x, i = args[0], 0
    while i < len(layers):
        follow, count = _following(layers, i)
        if count and _fits(layers[i], x):
            x = _run(layers[i], follow, x)
            i += 1 + count
        else:
            x = _convolved(layers[i], x) if _in_tiles(layers[i], x) else layers[i](x)
            i += 1
    return x


def _served(x: Any) -> bool:
    return (
        type(x) is Tensor
        and x.is_cpu
        and x.dtype in _DTYPES
        and plain_call(())  # no transform, no tracing
        and not torch.is_autocast_enabled("cpu")
        and _has_kernels()
    )


def _has_kernels() -> bool:
    return native.has_kernel("norm_act_pool_bwd", "cpu")


def _layers(module: nn.Module) -> list[nn.Module] | None:
    """The layers one after the other, through all that is nested; None where a hook or a forward of their own would see
    what stands between."""
    if not type(module).__module__.startswith("torch.nn.modules.") or _watched(module):
        return None
    if type(module) is not nn.Sequential:
        return None if module._modules else [module]
    parts = [_layers(part) for part in module]
    return None if any(part is None for part in parts) else [layer for part in parts for layer in part]


def _watched(layer: nn.Module) -> bool:
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__
        or layer._compiled_call_impl is not None
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def _following(layers: list[nn.Module], at: int) -> tuple[Follow, int]:
    """The activation and pool behind a norm, and how many layers they are."""
    follow, count = Follow(), 0
    if type(layers[at]) is not nn.BatchNorm2d:
        return follow, count
    for layer in layers[at + 1 : at + 3]:
        asked = _asked(layer)
        if asked is None:
            break
        longer = follow.pooled(**asked) if "pool" in asked else follow.activated(**asked)
        if longer is None:
            break
        follow, count = longer, count + 1
    return follow, count


def _asked(layer: nn.Module) -> dict[str, Any] | None:
    reader = _READERS.get(type(layer))
    return None if reader is None else reader(layer)


_READERS: dict[type, Callable[[Any], dict[str, Any] | None]] = {
    # in place or not: what they would write into is the norm's output, which is not there
    nn.ReLU: lambda m: ACTIVATIONS[F.relu](None),
    nn.LeakyReLU: lambda m: ACTIVATIONS[F.leaky_relu](None, m.negative_slope),
    nn.GELU: lambda m: ACTIVATIONS[F.gelu](None, approximate=m.approximate),
    nn.SiLU: lambda m: ACTIVATIONS[F.silu](None),
    nn.MaxPool2d: lambda m: POOLS[F.max_pool2d](
        None, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices
    ),
    nn.AvgPool2d: lambda m: POOLS[F.avg_pool2d](
        None, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    ),
}


def _in_tiles(layer: nn.Module, x: Any) -> bool:
    """Whether it is a convolution that the op computes faster than torch: by tiles (`csrc/cpu/conv/tiles.h`), or of the
    few channels that a picture has."""
    if type(layer) is not nn.Conv2d or type(x) is not Tensor or x.dim() != 4 or x.dtype != torch.float32:
        return False
    kind = (layer.kernel_size, layer.stride, layer.dilation, layer.groups, layer.padding_mode)
    if kind != ((3, 3), (1, 1), (1, 1), 1, "zeros") or layer.padding not in ((1, 1), "same"):
        return False
    given = [t for t in (layer.weight, layer.bias) if t is not None]
    if any(type(t) not in (Tensor, nn.Parameter) or t.dtype != x.dtype or not t.is_cpu for t in given):
        return False
    channels, filters = layer.in_channels, layer.out_channels
    if x.shape[1] != channels or not (channels >= 32 or channels <= 4) or filters < 32 or min(x.shape[2:]) < 5:
        return False
    numbers = x.numel() // channels * max(channels, filters)
    return numbers >= _LEAST_OF_CONVOLUTION and x.is_contiguous(memory_format=torch.channels_last)


def _convolved(layer: nn.Conv2d, x: Tensor) -> Tensor:
    bias = [] if layer.bias is None else [layer.bias.unsqueeze(0)]
    pixels = x.permute(0, 2, 3, 1).unsqueeze(0)
    weight = layer.weight.contiguous().unsqueeze(0)  # once, and not in both gradients again
    y = task_conv2d.SPEC(pixels, weight, bias, *task_conv2d.SAME)
    return y.squeeze(0).permute(0, 3, 1, 2)


def _fits(norm: nn.BatchNorm2d, x: Any) -> bool:
    """Images that lie as the op reads them, of as many channels and the dtype of the norm, and not so few that torch
    refuses them."""
    if type(x) is not Tensor or x.dim() != 4 or x.shape[1] != norm.num_features or min(x.shape[2:]) < 2:
        return False
    given = [t for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var) if t is not None]
    if any(type(t) not in (Tensor, nn.Parameter) or t.dtype != x.dtype or not t.is_cpu for t in given):
        return False
    return x.numel() >= max(tuned.number("one_pass", _LEAST), 1) and x.is_contiguous(memory_format=torch.channels_last)


def _run(norm: nn.BatchNorm2d, follow: Follow, x: Tensor) -> Tensor:
    of_rows = norm.training or norm.running_mean is None
    running = None if of_rows else [norm.running_mean.unsqueeze(0), norm.running_var.unsqueeze(0)]
    weight, bias = ([] if t is None else [t.unsqueeze(0)] for t in (norm.weight, norm.bias))
    block = Block.of(x.unsqueeze(0), weight, bias, "batch", 1, running, norm.eps)
    if norm.training and norm.track_running_stats and norm.running_mean is not None:
        _update(norm, *(m.view(-1) for m in block.moments), x.numel() // x.shape[1])
    return block(follow).squeeze(0)


@torch.no_grad()
def _update(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """The running statistics, as torch's `forward` moves them."""
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # the mean of all batches
            momentum = 1 / float(norm.num_batches_tracked)
    momentum = momentum or 0.0
    norm.running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
    norm.running_var.mul_(1 - momentum).add_(var, alpha=momentum * count / (count - 1))
