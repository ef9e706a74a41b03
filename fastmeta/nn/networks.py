"""The networks that few-shot results are reported with, and that of images for signals."""

from __future__ import annotations

from collections import OrderedDict
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


def conv4(
    in_channels: int = 1,
    hidden: int = 64,
    *,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] = 28,
    track_running_stats: bool = True,
) -> nn.Sequential:
    """The four-block encoder of Vinyals et al. 2016 and Snell et al. 2017: `[B, C, H, W]` -> `[B, features]`; with
    `num_classes` a classifier, `[B, num_classes]`, as MAML and its kin adapt.

    Each block is a 3x3 convolution, batch norm, ReLU and 2x2 max-pooling; 28x28 images give `hidden`
    features, 84x84 give `25 * hidden`. Weights have the names that the code of Snell et al. gave them, as most that are
    published have: `encoder.0.0.weight` is the first block's convolution, `encoder.0.1.weight` its batch norm; the head
    is `classifier`. Initialised as PyTorch does it, as there. A `state_dict` of the same net with its layers numbered
    in one row (`0.weight`, `1.weight`, `4.weight`) loads too.

    Args:
        in_channels: 1 for grey images, 3 for colour.
        hidden: channels of every block.
        num_classes: outputs of a linear layer at the end; None (default) for none.
        image_size: side, or height and width, of the images that the linear layer is made for, at least 16; 28 by
            default. Only read with `num_classes`.
        track_running_stats: False makes batch norm use the rows at hand in eval mode too, which is what MAML needs.

    Raises:
        TypeError, ValueError: an argument out of range.
    """
    values.count("in_channels", in_channels)
    values.count("hidden", hidden)
    values.flag("track_running_stats", track_running_stats)
    sides = values.counts("image_size", (image_size,) * 2 if isinstance(image_size, int) else image_size, 2)
    blocks = [
        nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1),
            nn.BatchNorm2d(hidden, track_running_stats=track_running_stats),
            # pooled before the ReLU: the same values and gradients (both are monotone), a quarter of the work
            nn.MaxPool2d(2),
            nn.ReLU(),
        )
        for channels in (in_channels, hidden, hidden, hidden)
    ]
    net = nn.Sequential(OrderedDict(encoder=nn.Sequential(*blocks, nn.Flatten())))
    if num_classes is not None:
        values.count("num_classes", num_classes)
        if len(sides) != 2 or min(sides) < 16:
            raise ValueError(f"image_size must be one or two sides of at least 16, got {image_size}")
        net.classifier = nn.Linear(hidden * (sides[0] // 16) * (sides[1] // 16), num_classes)
    net.register_load_state_dict_pre_hook(_numbered_in_one_row)
    # The weights' layout decides that of all activations; on a CPU a training step is 1.7 times as fast in this one.
    return net.to(memory_format=torch.channels_last)


def conv4_1d(
    in_channels: int = 3,
    hidden: int = 64,
    *,
    kernel_size: int = 5,
    num_classes: int | None = None,
    track_running_stats: bool = True,
) -> nn.Sequential:
    """`conv4` for signals, such as those of sensors: `[B, in_channels, L]` -> `[B, hidden]`; with `num_classes`
    `[B, num_classes]`.

    Four blocks of a convolution, batch norm, ReLU and max-pooling by 2 (a last odd position is kept),
    then the mean over the positions (Wang, Yan, Oates 2017, "Time Series Classification from Scratch with Deep Neural
    Networks: A Strong Baseline"), so that signals may have any length. Weights are called as in `conv4`.

    Args:
        in_channels: channels of the signal, 3 by default (the axes of an accelerometer).
        hidden: channels of every block.
        kernel_size: positions that a convolution sees, odd; 5 by default.
        num_classes: outputs of a linear layer at the end; None (default) for none.
        track_running_stats: False makes batch norm use the rows at hand in eval mode too, which is what MAML needs.

    Raises:
        TypeError, ValueError: an argument out of range.
    """
    values.count("in_channels", in_channels)
    values.count("hidden", hidden)
    values.flag("track_running_stats", track_running_stats)
    if values.count("kernel_size", kernel_size) % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")
    blocks = [
        nn.Sequential(
            nn.Conv1d(channels, hidden, kernel_size, padding=kernel_size // 2),
            nn.BatchNorm1d(hidden, track_running_stats=track_running_stats),
            nn.MaxPool1d(2, ceil_mode=True),
            nn.ReLU(),
        )
        for channels in (in_channels, hidden, hidden, hidden)
    ]
    net = nn.Sequential(OrderedDict(encoder=nn.Sequential(*blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten())))
    if num_classes is not None:
        net.classifier = nn.Linear(hidden, values.count("num_classes", num_classes))
    return net


def _numbered_in_one_row(net: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *_) -> None:
    """What a `conv4` had for names with its sixteen layers numbered in one row, and the linear layer last, as here."""
    if f"{prefix}0.weight" not in state_dict or f"{prefix}4.weight" not in state_dict:
        return
    for name in [name for name in state_dict if name.startswith(prefix)]:
        layer, _, rest = name[len(prefix) :].partition(".")
        if not layer.isdecimal():
            continue
        place = divmod(int(layer), 4)
        new = "classifier" if place[0] == 4 else f"encoder.{place[0]}.{place[1]}"
        state_dict[f"{prefix}{new}.{rest}"] = state_dict.pop(name)
