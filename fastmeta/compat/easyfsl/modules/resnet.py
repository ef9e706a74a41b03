"""Residual networks for small images, of torchvision's blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class ResNet(nn.Module):
    """Four groups of residual blocks, `[N, 3, H, W]` -> `[N, D]`.

    Args:
        block: torchvision BasicBlock or Bottleneck, or one like them: `block(inputs, planes, stride, downsample)`, with
            `expansion`.
        layers: blocks of each group.
        planes: of each group; default 64, 128, 256, 512.
        use_fc: put a linear layer of `num_classes` behind (default False).
        num_classes: default 1000; the layer is there in any case.
        use_pooling: average over the map (default), else give maps `[N, D, H', W']`.
        big_kernel: begin with 7 x 7 and a stride of 2, else (default) with 3 x 3 and 1.
        zero_init_residual: begin with each block as the identity (default False).

    Raises:
        ValueError: from `forward`: `use_fc` without `use_pooling`.
    """

    def __init__(
        self,
        block: type[nn.Module],
        layers: Sequence[int],
        planes: Sequence[int] | None = None,
        use_fc: bool = False,
        num_classes: int = 1000,
        use_pooling: bool = True,
        big_kernel: bool = False,
        zero_init_residual: bool = False,
    ):
        super().__init__()
        planes = (64, 128, 256, 512) if planes is None else planes
        self.inplanes = 64
        kernel, stride = (7, 2) if big_kernel else (3, 1)
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=kernel, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._make_layer(block, planes[0], layers[0])
        self.layer2 = self._make_layer(block, planes[1], layers[1], stride=2)
        self.layer3 = self._make_layer(block, planes[2], layers[2], stride=2)
        self.layer4 = self._make_layer(block, planes[3], layers[3], stride=2)
        self.use_pooling = use_pooling
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.use_fc = use_fc
        self.fc = nn.Linear(self.inplanes, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, block):
                    nn.init.zeros_((module.bn3 if hasattr(module, "bn3") else module.bn2).weight)

    def _make_layer(self, block: type[nn.Module], planes: int, blocks: int, stride: int = 1) -> nn.Module:
        width, downsample = planes * block.expansion, None
        if stride != 1 or self.inplanes != width:
            downsample = nn.Sequential(
                nn.Conv2d(self.inplanes, width, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(width)
            )
        first = block(self.inplanes, planes, stride, downsample)
        self.inplanes = width
        return nn.Sequential(first, *(block(width, planes) for _ in range(1, blocks)))

    def forward(self, x: Tensor) -> Tensor:
        if self.use_fc and not self.use_pooling:
            raise ValueError("the linear layer of `use_fc` needs pooled features: `use_pooling=True`")
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        if self.use_pooling:
            x = self.avgpool(x).flatten(1)
        return self.fc(x) if self.use_fc else x

    def set_use_fc(self, use_fc: bool) -> None:
        self.use_fc = use_fc
