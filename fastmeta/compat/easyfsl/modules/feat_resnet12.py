"""The residual network of FEAT, without its dropout, with the parameters' names of its checkpoints."""

from __future__ import annotations

from torch import Tensor, nn


class FEATBasicBlock(nn.Module):
    """Three convolutions, a residual connection, and a pool of `stride`."""

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None):
        super().__init__()
        for number, channels in enumerate((inplanes, planes, planes), 1):
            self.add_module(f"conv{number}", nn.Conv2d(channels, planes, kernel_size=3, padding=1, bias=False))
            self.add_module(f"bn{number}", nn.BatchNorm2d(planes))
        self.relu = nn.LeakyReLU(0.1)
        self.maxpool = nn.MaxPool2d(stride)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.maxpool(self.relu(out + (x if self.downsample is None else self.downsample(x))))


class FEATResNet12(nn.Module):
    """Four blocks of 64, 160, 320 and 640 channels, `[N, 3, H, W]` -> `[N, 640]`."""

    def __init__(self, block: type[nn.Module] = FEATBasicBlock):
        super().__init__()
        self.inplanes = 3
        for number, planes in enumerate((64, 160, 320, 640), 1):
            width = planes * block.expansion
            downsample = nn.Sequential(
                nn.Conv2d(self.inplanes, width, kernel_size=1, bias=False), nn.BatchNorm2d(width)
            )
            self.add_module(f"layer{number}", nn.Sequential(block(self.inplanes, planes, 2, downsample)))
            self.inplanes = width
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((-2, -1))


def feat_resnet12(**kwargs) -> FEATResNet12:
    """Keyword arguments are those of `FEATResNet12`."""
    return FEATResNet12(FEATBasicBlock, **kwargs)
