"""Glyphs drawn here: an alphabet without end, of the difficulty of Omniglot, for where there is no data and no network.

A class is a few strokes (cubic Bezier curves) with random control points; an instance draws them with a shaky hand:
control points move, the whole glyph is rotated, sheared, scaled and shifted, the pen is thicker or thinner.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from fastmeta import values

CLASSES = {"train": 400, "val": 100, "test": 160}
INSTANCES = 20
SIZE = 28
_POINTS = 10  # of a stroke, joined by straight lines


def glyphs(split: str = "train", seed: int = 0) -> Tensor:
    """The classes of a split, uint8 `[classes, 20, 1, 28, 28]`, ink 255; the same for the same seed, on any machine.

    Splits have different classes: 400 in "train", 100 in "val", 160 in "test".
    """
    values.choice("split", split, tuple(CLASSES))
    return _glyphs(split, values.seed("seed", seed), CLASSES[split])


@lru_cache(maxsize=6)
def _glyphs(split: str, seed: int, classes: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + list(CLASSES).index(split))
    strokes = _strokes(classes, generator)
    chunks = []
    for part in strokes.split(50):  # bounds memory: all distances of 50 classes at a time
        instances = _instances(part, generator)
        width = 0.022 + 0.014 * torch.rand(len(instances), generator=generator)
        chunks.append(_draw(instances, width).view(len(part), INSTANCES, 1, SIZE, SIZE))
    return torch.cat(chunks)


def _strokes(classes: int, generator: torch.Generator) -> Tensor:
    """Control points `[classes, strokes, 4, 2]` in the unit square; NaN for strokes that a class does not have."""
    most = 4
    start = 0.15 + 0.7 * torch.rand(classes, most, 1, 2, generator=generator)
    turn = torch.rand(classes, most, 1, generator=generator) * 2 * math.pi
    bends = (torch.rand(classes, most, 3, generator=generator) - 0.5) * 2.4
    angle = turn + bends.cumsum(-1)
    length = 0.12 + 0.22 * torch.rand(classes, most, 3, 1, generator=generator)
    steps = length * torch.stack([angle.cos(), angle.sin()], -1)
    points = torch.cat([start, start + steps.cumsum(2)], 2)
    # some strokes start where another passes, as in writing
    joined = torch.rand(classes, most - 1, generator=generator) < 0.5
    shift = points[:, :-1, 2] - points[:, 1:, 0]
    points[:, 1:] += torch.where(joined[..., None, None], shift.unsqueeze(2), torch.zeros(()))
    count = torch.randint(2, most + 1, (classes, 1), generator=generator)
    absent = (torch.arange(most) >= count)[..., None, None]
    # written to the same size, as people do: the bounding box fills the middle of the square
    flat = points.masked_fill(absent, math.nan).flatten(1, 2)
    low, high = (flat.nan_to_num(fill).aminmax(dim=1)[i] for i, fill in enumerate((math.inf, -math.inf)))
    middle, extent = (low + high) / 2, (high - low).amax(-1, keepdim=True)
    points = (points - middle[:, None, None]) / extent[:, None, None] * 0.66 + 0.5
    return points.masked_fill(absent, math.nan)


def _instances(strokes: Tensor, generator: torch.Generator) -> Tensor:
    """`[classes * 20, strokes, 4, 2]`: each class drawn twenty times by a shaky hand."""
    points = strokes.repeat_interleave(INSTANCES, 0)
    n = len(points)

    def normal(*shape: int) -> Tensor:
        return torch.randn(n, *shape, generator=generator)

    points = points + 0.045 * normal(*points.shape[1:]) + 0.035 * normal(points.shape[1], 1, 2)
    angle, shear = 0.16 * normal(), 0.14 * normal()
    scale = 1 + 0.12 * normal(2)
    matrix = torch.stack(
        [
            torch.stack([angle.cos() * scale[:, 0], (shear - angle.sin()) * scale[:, 1]], -1),
            torch.stack([angle.sin() * scale[:, 0], angle.cos() * scale[:, 1]], -1),
        ],
        -2,
    )
    shift = 0.04 * normal(1, 1, 2)
    return torch.einsum("nij,nskj->nski", matrix, points - 0.5) + 0.5 + shift


def _draw(points: Tensor, width: Tensor) -> Tensor:
    """uint8 `[n, 28, 28]`: ink where a pixel's centre is within the pen's width of a stroke, soft at the edge."""
    t = torch.linspace(0, 1, _POINTS).unsqueeze(-1)
    basis = torch.cat([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], -1)
    curve = torch.einsum("pk,nskd->nspd", basis, points)
    start, along = curve[:, :, :-1], curve[:, :, 1:] - curve[:, :, :-1]
    centre = (torch.arange(SIZE) + 0.5) / SIZE
    pixel = torch.stack(torch.meshgrid(centre, centre, indexing="xy"), -1).view(1, SIZE * SIZE, 2)
    nearest = torch.full((len(points), SIZE * SIZE), math.inf)
    for s in range(start.shape[1]):
        for p in range(start.shape[2]):
            a, b = start[:, s, p].unsqueeze(1), along[:, s, p].unsqueeze(1)
            offset = pixel - a
            at = ((offset * b).sum(-1) / b.square().sum(-1).clamp_min(1e-12)).clamp(0, 1)
            square = (offset - at.unsqueeze(-1) * b).square().sum(-1)
            nearest = torch.fmin(nearest, square)  # an absent stroke is NaN, and fmin passes over it
    edge = 0.6 / SIZE
    ink = ((width.unsqueeze(1) - nearest.sqrt()) / edge + 0.5).clamp(0, 1)
    return (ink * 255).round().to(torch.uint8).view(-1, SIZE, SIZE)
