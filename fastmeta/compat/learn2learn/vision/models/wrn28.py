"""WRN-28-10 (Zagoruyko, Komodakis 2016, "Wide Residual Networks"; as Ye et al. 2020 have it for few-shot work), under
learn2learn's names of its parameters."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class wide_basic(nn.Module):
    """Two convolutions, each behind its batch norm, with a shortcut."""

    def __init__(self, in_planes: int, planes: int, dropout_rate: float, stride: int = 1):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, padding=1)
        self.dropout = nn.Dropout(dropout_rate)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1)
        same = stride == 1 and in_planes == planes
        self.shortcut = nn.Sequential(*() if same else [nn.Conv2d(in_planes, planes, 1, stride=stride)])

    def forward(self, x: Tensor) -> Tensor:
        out = self.dropout(self.conv1(F.relu(self.bn1(x))))
        return self.conv2(F.relu(self.bn2(out))) + self.shortcut(x)


class WideResNet(nn.Module):
    """`[N, 3, 84, 84]` -> `[N, 64 * widen_factor]`; `depth` is `6 n + 4`."""

    def __init__(self, depth: int, widen_factor: int, dropout_rate: float):
        super().__init__()
        assert (depth - 4) % 6 == 0, "Wide-resnet depth should be 6n+4"
        self.in_planes = 16
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        for i in (1, 2, 3):
            planes, blocks = 8 * 2**i * widen_factor, []
            for number in range((depth - 4) // 6):
                blocks.append(wide_basic(self.in_planes, planes, dropout_rate, 2 if i > 1 and number == 0 else 1))
                self.in_planes = planes
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        self.bn1 = nn.BatchNorm2d(self.in_planes, momentum=0.9)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return F.avg_pool2d(F.relu(self.bn1(out)), 21).flatten(1)


class WRN28Backbone(WideResNet):
    """28 layers, ten times as wide."""

    def __init__(self, dropout: float = 0.0):
        super().__init__(depth=28, widen_factor=10, dropout_rate=dropout)


class WRN28(nn.Module):
    """`features`, a `WRN28Backbone`, and `classifier`, a linear layer of `hidden_size` to `output_size`."""

    def __init__(self, output_size: int, hidden_size: int = 640, dropout: float = 0.0):
        super().__init__()
        self.features = WRN28Backbone(dropout)
        self.classifier = nn.Linear(hidden_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))
