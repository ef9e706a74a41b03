"""ResNet-12 (Lee et al. 2019, "Meta-Learning with Differentiable Convex Optimization"), with learn2learn's names of
its parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...nn.misc import Flatten


class DropBlock(nn.Module):
    """Zeros in blocks of `block_size` by `block_size` (Ghiasi et al. 2018), each of which begins with the probability
    `gamma`; what is left is scaled up. In eval mode nothing is dropped."""

    def __init__(self, block_size: int):
        super().__init__()
        self.block_size = block_size

    def forward(self, x: Tensor, gamma: float) -> Tensor:
        if not self.training:
            return x
        border = self.block_size - 1
        starts = (*x.shape[:2], x.shape[2] - border, x.shape[3] - border)
        begun = torch.distributions.Bernoulli(gamma).sample(starts).to(x.device)
        kept = 1 - F.max_pool2d(F.pad(begun, (border,) * 4), self.block_size, stride=1)
        return kept * x * (kept.numel() / kept.sum())


class BasicBlock(nn.Module):
    """Three convolutions with a shortcut, a pool of `stride`, and dropout: of numbers, or of blocks, which become more
    over the first 40,000 forwards."""

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        drop_rate: float = 0.0,
        drop_block: bool = False,
        block_size: int = 1,
    ):
        super().__init__()
        for i, width in enumerate((inplanes, planes, planes), 1):
            self.add_module(f"conv{i}", nn.Conv2d(width, planes, 3, padding=1, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(planes))
        self.relu = nn.LeakyReLU(0.1)
        self.maxpool = nn.MaxPool2d(stride)
        self.downsample = downsample
        self.stride, self.drop_rate, self.drop_block, self.block_size = stride, drop_rate, drop_block, block_size
        self.num_batches_tracked = 0
        self.DropBlock = DropBlock(block_size)

    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked += 1
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        out = self.maxpool(self.relu(out + (x if self.downsample is None else self.downsample(x))))
        if self.drop_rate <= 0:
            return out
        if not self.drop_block:
            return F.dropout(out, self.drop_rate, self.training)
        dropped = min(self.drop_rate / 40000 * self.num_batches_tracked, self.drop_rate)
        size = out.shape[2]
        return self.DropBlock(out, dropped / self.block_size**2 * size**2 / (size - self.block_size + 1) ** 2)


class ResNet12Backbone(nn.Module):
    """`[N, channels, H, W]` -> rows; of 640 for 84 x 84 images.

    Args:
        avg_pool: a mean over 5 x 5 at the end (default), or all 16,000 numbers.
        wider: 64, 160, 320 and 640 channels (default), or 64, 128, 256 and 512.
        embedding_dropout: of the rows.
        dropblock_dropout: of the blocks; in the last two, of squares of `dropblock_size`.
        channels: of the images.
    """

    def __init__(
        self,
        avg_pool: bool = True,
        wider: bool = True,
        embedding_dropout: float = 0.0,
        dropblock_dropout: float = 0.1,
        dropblock_size: int = 5,
        channels: int = 3,
    ):
        super().__init__()
        self.inplanes = channels
        for i, planes in enumerate((64, 160, 320, 640) if wider else (64, 128, 256, 512), 1):
            shortcut = nn.Sequential(nn.Conv2d(self.inplanes, planes, 1, bias=False), nn.BatchNorm2d(planes))
            drop = (dropblock_dropout, True, dropblock_size) if i > 2 else (dropblock_dropout,)
            self.add_module(f"layer{i}", nn.Sequential(BasicBlock(self.inplanes, planes, 2, shortcut, *drop)))
            self.inplanes = planes
        self.avgpool = nn.AvgPool2d(5, stride=1) if avg_pool else nn.Identity()
        self.flatten = Flatten()
        self.embedding_dropout, self.dropblock_dropout = embedding_dropout, dropblock_dropout
        self.keep_avg_pool = avg_pool
        self.dropout = nn.Dropout(embedding_dropout)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.dropout(self.flatten(self.avgpool(x)))


class ResNet12(nn.Module):
    """`features`, a `ResNet12Backbone`, and `classifier`, a linear layer of `hidden_size` to `output_size`."""

    def __init__(
        self,
        output_size: int,
        hidden_size: int = 640,
        avg_pool: bool = True,
        wider: bool = True,
        embedding_dropout: float = 0.0,
        dropblock_dropout: float = 0.1,
        dropblock_size: int = 5,
        channels: int = 3,
    ):
        super().__init__()
        self.features = ResNet12Backbone(
            avg_pool, wider, embedding_dropout, dropblock_dropout, dropblock_size, channels
        )
        self.classifier = nn.Linear(hidden_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))
