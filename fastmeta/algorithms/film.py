"""Feature-wise linear modulation (Perez et al. 2018): features are scaled and shifted, channel by channel.

By what differs. In `FiLM`, `FiLMConv4` and `FiLMMLP` every row has a condition `[B, condition]` of its own, as in the
paper, in `ConditionalCAML` and in `ModulatedProtoNet`. In `ContextFiLM` and `ContextFiLMConv4` all rows of a task share
its context `[P]`, which adapts to the task, as in `CAVIA`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta import values


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        values.count(name, value)


def modulated(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """`(1 + gamma) * x + beta`: 0 and 0 change nothing."""
    return torch.addcmul(beta, 1 + gamma, x)


class FiLM(nn.Module):
    """`(1 + gamma) * x + beta`, with `gamma` and `beta` for each channel of each row from the row's condition, by a
    perceptron with one hidden layer (Perez et al. 2018, "FiLM", equation 1, around 1 as their section 2.2 has it).

    Args: condition: width of the condition. channels: of `x` `[B, channels, ...]`. hidden: of the perceptron.
    """

    def __init__(self, condition: int, channels: int, hidden: int = 32):
        super().__init__()
        _check_counts(condition=condition, channels=channels, hidden=hidden)
        self.code = nn.Sequential(nn.Linear(condition, hidden), nn.ReLU(), nn.Linear(hidden, 2 * channels))
        with torch.no_grad():
            self.code[2].weight.mul_(0.1)  # begins near the network without modulation

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gamma, beta = self.code(condition).unflatten(1, (2, -1, *(1 for _ in range(x.dim() - 2)))).unbind(1)
        return modulated(x, gamma, beta)


class FiLMConv4(nn.Module):
    """`fastmeta.nn.conv4` with each batch norm modulated: images `[B, C, H, W]` and conditions `[B, condition]` to
    features `[B, F]`; 28x28 images give F = `hidden`.

    Args:
        condition: width of the condition, `2 D` for `ModulatedProtoNet`, `D` for `ConditionalCAML`.
        in_channels: of the images, 1 by default.
        hidden: channels of every block, 64 by default.
        outputs: of a linear layer behind the features, which is what an inner loop needs; None, the default: no such
            layer.
        image_size: of the square images in front of it, 28 by default; at least 16.
        track_running_stats: as in `BatchNorm2d`, True by default; False for an inner loop.
    """

    def __init__(
        self,
        condition: int,
        in_channels: int = 1,
        hidden: int = 64,
        *,
        outputs: int | None = None,
        image_size: int = 28,
        track_running_stats: bool = True,
    ):
        super().__init__()
        _check_counts(condition=condition, in_channels=in_channels, hidden=hidden)
        values.flag("track_running_stats", track_running_stats)
        if outputs is not None:
            values.count("outputs", outputs)
            values.count("image_size", image_size, 16)  # four poolings halve it
        widths = (in_channels, hidden, hidden, hidden)
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, hidden, 3, padding=1) for channels in widths)
        # gamma and beta take the place of the norm's own scale and shift
        norm = {"affine": False, "track_running_stats": track_running_stats}
        self.norms = nn.ModuleList(nn.BatchNorm2d(hidden, **norm) for _ in widths)
        self.films = nn.ModuleList(FiLM(condition, hidden) for _ in widths)
        self.head = None if outputs is None else nn.Linear(hidden * (image_size // 16) ** 2, outputs)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for convolution, norm, film in zip(self.convolutions, self.norms, self.films, strict=True):
            x = F.max_pool2d(film(norm(convolution(x)), condition), 2).relu()
        return x.flatten(1) if self.head is None else self.head(x.flatten(1))


class FiLMMLP(nn.Module):
    """A perceptron whose hidden layers are modulated before their ReLU: `[B, ...]` and `[B, condition]` -> `[B, F]`.

    Args: condition: width of the condition, `2 D` for `ModulatedProtoNet`, `D` for `ConditionalCAML`. sizes: widths,
        those of input and output included, at least three.
    """

    def __init__(self, condition: int, sizes):
        super().__init__()
        sizes = values.counts("sizes", sizes, 3)
        values.count("condition", condition)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes[:-1], sizes[1:], strict=True))
        self.films = nn.ModuleList(FiLM(condition, width) for width in sizes[1:-1])

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer, film in zip(self.layers[:-1], self.films, strict=True):
            x = film(layer(x), condition).relu()
        return self.layers[-1](x)


class ContextFiLM(nn.Module):
    """Feature-wise modulation (Perez et al. 2018) by a task's context: `(1 + gamma) * h + beta` per channel, with
    `gamma` and `beta` linear in the context, so that a context of zeros changes nothing.

    Args:
        context_size: `P`.
        channels: of the features `[B, channels, ...]`.
    """

    def __init__(self, context_size: int, channels: int):
        super().__init__()
        _check_counts(context_size=context_size, channels=channels)
        self.modulation = nn.Linear(context_size, 2 * channels, bias=False)

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        """`h` `[B, channels, ...]`, `context` `[P]`."""
        gamma, beta = self.modulation(context).view(2, -1, *[1] * (h.dim() - 2))
        return modulated(h, gamma, beta)


class ContextFiLMConv4(nn.Module):
    """The four-block network of few-shot image classification with FiLM after one block's batch norm (Zintgraf et al.
    2019, section 5.2: the third), for `CAVIA(..., concatenate=False)`.

    Each block is a 3x3 convolution, batch norm (of the rows at hand, in eval mode too), ReLU and 2x2 max-pooling; then
    a linear layer.

    Args:
        outputs: classes.
        context_size: `P`, 100 by default.
        in_channels: 1 by default.
        hidden: channels of every block, 32 by default.
        image_size: of the square images, 28 by default; at least 16.
        film_after: which block, 3 by default.
    """

    def __init__(
        self,
        outputs: int,
        context_size: int = 100,
        *,
        in_channels: int = 1,
        hidden: int = 32,
        image_size: int = 28,
        film_after: int = 3,
    ):
        super().__init__()
        _check_counts(outputs=outputs, context_size=context_size, in_channels=in_channels, hidden=hidden)
        if values.count("film_after", film_after) > 4:
            raise ValueError(f"film_after must be 1, 2, 3 or 4, got {film_after}")
        values.count("image_size", image_size, 16)  # four poolings halve it
        widths = (in_channels, hidden, hidden, hidden)
        self.film_after = film_after
        self.convolutions = nn.ModuleList(nn.Conv2d(width, hidden, 3, padding=1) for width in widths)
        self.norms = nn.ModuleList(nn.BatchNorm2d(hidden, track_running_stats=False) for _ in widths)
        self.film = ContextFiLM(context_size, hidden)
        self.head = nn.Linear(hidden * (image_size // 16) ** 2, outputs)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """`[B, in_channels, image_size, image_size]` and `[P]` to `[B, outputs]`."""
        for block, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True), 1):
            x = norm(convolution(x))
            if block == self.film_after:
                x = self.film(x, context)
            x = F.max_pool2d(x.relu(), 2)
        return self.head(x.flatten(1))
