"""The residual encoders that few-shot results on 84x84 images are reported with.

Parameters have the names that published weights have, so that a `state_dict` of theirs loads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta import values


class ResNet12(nn.Module):
    """`resnet12` makes it: four blocks, then the mean over the image."""

    def __init__(self, in_channels: int, widths: Sequence[int], drop_rate: float, track_running_stats: bool):
        super().__init__()
        width = in_channels
        for i, new in enumerate(widths, 1):
            block = _Block12(width, new, drop_rate, track_running_stats)
            self.add_module(f"layer{i}", nn.Sequential(block))  # weights are called layer1.0.conv1.weight
            width = new
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, widths[-1]]`."""
        for layer in self.children():
            x = layer(x)
        return x.mean((2, 3))


class _Block12(nn.Module):
    def __init__(self, width_in: int, width: int, drop_rate: float, track_running_stats: bool):
        super().__init__()

        def norm() -> nn.Module:
            return nn.BatchNorm2d(width, track_running_stats=track_running_stats)

        self.conv1, self.bn1 = nn.Conv2d(width_in, width, 3, padding=1, bias=False), norm()
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm()
        self.conv3, self.bn3 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm()
        self.downsample = nn.Sequential(nn.Conv2d(width_in, width, 1, bias=False), norm())
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.bn1(self.conv1(x)), 0.1)
        h = F.leaky_relu(self.bn2(self.conv2(h)), 0.1)
        h = self.bn3(self.conv3(h)) + self.downsample(x)
        # pooled before the activation: the same values and gradients (both are monotone), a quarter of the work
        return self.drop(F.leaky_relu(F.max_pool2d(h, 2), 0.1))


class WideResNet(nn.Module):
    """`wrn28_10` makes it: three groups of pre-activation blocks, then the mean over the image."""

    def __init__(self, in_channels: int, depth: int, factor: int, drop_rate: float, track_running_stats: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        width = 16
        for i, new in enumerate((16 * factor, 32 * factor, 64 * factor), 1):
            group = _Group(width, new, (depth - 4) // 6, 1 if i == 1 else 2, drop_rate, track_running_stats)
            self.add_module(f"block{i}", group)
            width = new
        self.bn1 = nn.BatchNorm2d(width, track_running_stats=track_running_stats)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, 64 * factor]`."""
        h = self.block3(self.block2(self.block1(self.conv1(x))))
        return F.relu(self.bn1(h)).mean((2, 3))


class _Group(nn.Module):
    def __init__(self, width_in: int, width: int, blocks: int, stride: int, drop_rate: float, track: bool):
        super().__init__()
        made = [_WideBlock(width_in if i == 0 else width, width, 1 if i else stride, drop_rate, track)
                for i in range(blocks)]  # fmt: skip
        self.layer = nn.Sequential(*made)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class _WideBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int, drop_rate: float, track: bool):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in, track_running_stats=track)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width, track_running_stats=track)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.drop = nn.Dropout(drop_rate)
        self.convShortcut = None if width_in == width else nn.Conv2d(width_in, width, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        h = self.conv2(self.drop(F.relu(self.bn2(self.conv1(active)))))
        return h + (x if self.convShortcut is None else self.convShortcut(active))


def resnet12(
    in_channels: int = 3,
    widths: Sequence[int] = (64, 160, 320, 640),
    *,
    drop_rate: float = 0.0,
    track_running_stats: bool = True,
) -> ResNet12:
    """ResNet-12 as few-shot work has it (Oreshkin et al. 2018, "TADAM"; widths of Lee et al. 2019, "Meta-Learning with
    Differentiable Convex Optimization"): `[B, in_channels, H, W]` -> `[B, widths[-1]]`, for images of at least 16x16.

    Four blocks of three 3x3 convolutions with batch norm and leaky ReLU (0.1) beside a 1x1 convolution, each followed
    by 2x2 max-pooling. Departure: dropout of numbers after each block where the latter have DropBlock.

    Args:
        in_channels: 3 for colour, 1 for grey images.
        widths: channels of the four blocks; `(64, 128, 256, 512)` is the narrower form.
        drop_rate: from 0 to below 1, 0 by default.
        track_running_stats: False makes batch norm use the rows at hand in eval mode too, which is what MAML needs.

    Raises:
        TypeError, ValueError: an argument out of range.
    """
    values.count("in_channels", in_channels)
    widths = values.counts("widths", widths, 1)
    values.number("drop_rate", drop_rate, 0, below=1)
    values.flag("track_running_stats", track_running_stats)
    return ResNet12(in_channels, widths, drop_rate, track_running_stats).to(memory_format=torch.channels_last)


def wrn28_10(
    in_channels: int = 3,
    *,
    depth: int = 28,
    factor: int = 10,
    drop_rate: float = 0.0,
    track_running_stats: bool = True,
) -> WideResNet:
    """WRN-28-10 (Zagoruyko, Komodakis 2016, "Wide Residual Networks"; for few-shot work Rusu et al. 2019, "LEO"):
    `[B, in_channels, H, W]` -> `[B, 64 * factor]`.

    Args:
        in_channels: 3 for colour, 1 for grey images.
        depth: layers, `6 n + 4`.
        factor: how much wider than the ordinary network.
        drop_rate: between a block's convolutions, from 0 to below 1, 0 by default.
        track_running_stats: False makes batch norm use the rows at hand in eval mode too, which is what MAML needs.

    Raises:
        TypeError, ValueError: an argument out of range.
    """
    values.count("in_channels", in_channels)
    values.count("factor", factor)
    if values.count("depth", depth, 10) % 6 != 4:
        raise ValueError(f"depth must be 6 n + 4, got {depth}")
    values.number("drop_rate", drop_rate, 0, below=1)
    values.flag("track_running_stats", track_running_stats)
    return WideResNet(in_channels, depth, factor, drop_rate, track_running_stats).to(memory_format=torch.channels_last)
