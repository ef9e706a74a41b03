"""The networks of few and small layers, under learn2learn's names of their parameters."""

from __future__ import annotations

from torch import Tensor, nn

from ...nn.misc import Flatten, Lambda


def fc_init_(module: nn.Module) -> nn.Module:
    """Weights normal with deviation 0.01, cut off at two of them; biases 0."""
    if getattr(module, "weight", None) is not None:
        nn.init.trunc_normal_(module.weight, std=0.01, a=-0.02, b=0.02)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)
    return module


def maml_init_(module: nn.Module) -> nn.Module:
    """Weights by Xavier's uniform rule; biases 0."""
    nn.init.xavier_uniform_(module.weight)
    nn.init.zeros_(module.bias)
    return module


class LinearBlock(nn.Module):
    """Linear layer, batch norm by the rows at hand, relu."""

    def __init__(self, input_size: int, output_size: int):
        super().__init__()
        self.relu = nn.ReLU()
        self.normalize = nn.BatchNorm1d(output_size, momentum=0.999, eps=1e-3, track_running_stats=False)
        self.linear = fc_init_(nn.Linear(input_size, output_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.normalize(self.linear(x)))


class ConvBlock(nn.Module):
    """Convolution, batch norm, relu, and a max pool; without it the convolution takes its stride,
    `int(2 * max_pool_factor)`."""

    def __init__(self, in_channels, out_channels, kernel_size, max_pool: bool = True, max_pool_factor: float = 1.0):
        super().__init__()
        stride = (int(2 * max_pool_factor),) * 2
        self.max_pool = nn.MaxPool2d(stride, stride) if max_pool else nn.Identity()
        self.normalize = nn.BatchNorm2d(out_channels)
        nn.init.uniform_(self.normalize.weight)
        self.relu = nn.ReLU()
        conv_stride = (1, 1) if max_pool else stride
        self.conv = maml_init_(nn.Conv2d(in_channels, out_channels, kernel_size, stride=conv_stride, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.max_pool(self.relu(self.normalize(self.conv(x))))


class ConvBase(nn.Sequential):
    """`layers` `ConvBlock`s with kernels of 3 x 3."""

    def __init__(
        self,
        hidden: int = 64,
        channels: int = 1,
        max_pool: bool = False,
        layers: int = 4,
        max_pool_factor: float = 1.0,
    ):
        widths = [channels, *[hidden] * layers]
        pairs = zip(widths[:-1], widths[1:], strict=True)
        super().__init__(*(ConvBlock(i, o, (3, 3), max_pool, max_pool_factor) for i, o in pairs))


class OmniglotFC(nn.Module):
    """`[B, ...]` of `input_size` elements a row to `[B, output_size]`, by `LinearBlock`s of `sizes`, default
    `[256, 128, 64, 64]`."""

    def __init__(self, input_size: int, output_size: int, sizes=None):
        super().__init__()
        widths = [input_size, *([256, 128, 64, 64] if sizes is None else sizes)]
        blocks = nn.Sequential(*(LinearBlock(i, o) for i, o in zip(widths[:-1], widths[1:], strict=True)))
        self.features = nn.Sequential(Flatten(), blocks)
        self.classifier = fc_init_(nn.Linear(widths[-1], output_size))
        self.input_size = input_size

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class OmniglotCNN(nn.Module):
    """Images of 28 x 28 with one channel to `[B, output_size]`: strided blocks, and the mean over what is left."""

    def __init__(self, output_size: int = 5, hidden_size: int = 64, layers: int = 4):
        super().__init__()
        self.hidden_size = hidden_size
        self.base = ConvBase(hidden=hidden_size, channels=1, max_pool=False, layers=layers)
        self.features = nn.Sequential(Lambda(_as_omniglot), self.base, Lambda(_mean_of_places), Flatten())
        self.classifier = nn.Linear(hidden_size, output_size)
        nn.init.normal_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


def _as_omniglot(x: Tensor) -> Tensor:
    return x.view(-1, 1, 28, 28)


def _mean_of_places(x: Tensor) -> Tensor:
    return x.mean(dim=[2, 3])


class CNN4Backbone(ConvBase):
    """`ConvBase` whose result is one row an image."""

    def __init__(
        self, hidden_size: int = 64, layers: int = 4, channels: int = 3, max_pool: bool = True, max_pool_factor=None
    ):
        factor = 4 // layers if max_pool_factor is None else max_pool_factor
        super().__init__(hidden_size, channels, max_pool, layers, factor)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(1)


class CNN4(nn.Module):
    """Images, `[B, 3, 84, 84]` by default, to `[B, output_size]`.

    Args:
        output_size: classes.
        hidden_size: channels of each block; 64 by default.
        layers, channels, max_pool: as in `ConvBase`; 4, 3 and True by default.
        embedding_size: elements of a row behind the blocks; by default `25 * hidden_size`.
    """

    def __init__(
        self,
        output_size: int,
        hidden_size: int = 64,
        layers: int = 4,
        channels: int = 3,
        max_pool: bool = True,
        embedding_size: int | None = None,
    ):
        super().__init__()
        embedding_size = 25 * hidden_size if embedding_size is None else embedding_size
        self.features = CNN4Backbone(hidden_size, layers, channels, max_pool)
        self.classifier = maml_init_(nn.Linear(embedding_size, output_size))
        self.hidden_size = hidden_size

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


MiniImagenetCNN = CNN4
