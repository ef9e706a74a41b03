"""Random changes of images that leave what they show: the only teacher where there are no labels."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmeta import values
from fastmeta.tasks._arguments import check_images

_KNOTS = 4  # of the displacement field, along each side


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a batch of images, each image with random numbers of its own; no loop over images.

    The geometric ones are one map of coordinates and one bilinear interpolation; what lies outside an image is 0. With
    every value 0 the images come back as they are.

    Args:
        rotate: largest angle in degrees, drawn from U[-rotate, rotate].
        scale: both sides by `exp(U[-scale, scale])`, each by its own.
        shift: of each axis, as a fraction of the side, from U[-shift, shift].
        shear: tangent of the angle, from U[-shear, shear].
        crop: a window of `1 - U[0, crop]` of the side, anywhere inside, is resized to the whole image.
        elastic: standard deviation of a smooth random displacement, as a fraction of the side (Simard et al. 2003,
            "Best Practices for Convolutional Neural Networks Applied to Visual Document Analysis"; the field here is a
            bicubic interpolation of normal numbers on a 4 x 4 grid). With the affine changes it imitates other hands.
        thicken: strokes as much thicker or thinner as a 3 x 3 maximum or minimum makes them, times
            U[-thicken, thicken]; ink is bright.
        drop: probability that a pixel is set to 0, in all channels (Khodadadeh et al. 2019, UMTRA, on Omniglot).

    Calling it with images `[B, C, H, W]`, floating or uint8 (of which 255 is 1.0), and a `generator` of their device
    (None: the global one) gives floating `[B, C, H, W]`, in the range of the images and 0.

    Raises:
        ValueError: a negative value, `crop` or `drop` of 1 or more, `thicken` above 1; images of another shape.
        TypeError: a value that is not a number.
    """

    rotate: float = 0.0
    scale: float = 0.0
    shift: float = 0.0
    shear: float = 0.0
    crop: float = 0.0
    elastic: float = 0.0
    thicken: float = 0.0
    drop: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            below = 1 if field.name in ("crop", "drop") else None
            values.number(field.name, getattr(self, field.name), 0, below=below)
        if self.thicken > 1:
            raise ValueError(f"thicken must be at most 1, got {self.thicken}")

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        check_images(images, "[B, C, H, W]", 4, 4)
        values.generator("generator", generator, images.device)
        images = images.float().div_(255) if images.dtype == torch.uint8 else images
        if not images.numel():
            return images
        if self.rotate or self.scale or self.shift or self.shear or self.crop or self.elastic:
            grid = self._grid(images, generator)
            images = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        if self.thicken:
            images = self._pen(images, generator)
        if self.drop:
            shape = (len(images), 1, *images.shape[2:])
            images = images * (torch.rand(shape, device=images.device, generator=generator) >= self.drop)
        return images

    def _grid(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Where every pixel of the result is taken from, `[B, H, W, 2]`, in units of half a side."""
        count, (height, width) = len(images), images.shape[2:]
        like = {"device": images.device, "dtype": images.dtype}

        def uniform(most: float, *shape: int) -> Tensor:
            return (torch.rand(count, *shape, generator=generator, **like) * 2 - 1) * most

        angle, shear = uniform(math.radians(self.rotate)), uniform(self.shear)
        scale = uniform(self.scale, 2).exp()
        window = 1 - uniform(self.crop).abs()
        cos, sin = angle.cos(), angle.sin()
        # rotation times shear times scale, in pixels; a side's own unit makes them so in images that are not square
        matrix = torch.stack(
            [
                torch.stack([cos * scale[:, 0], (shear * cos - sin) * scale[:, 1] * (height / width)], -1),
                torch.stack([sin * scale[:, 0] * (width / height), (shear * sin + cos) * scale[:, 1]], -1),
            ],
            -2,
        )
        offset = uniform(2 * self.shift, 2) + uniform(1.0, 2) * (1 - window).unsqueeze(1)
        theta = torch.cat([matrix * window[:, None, None], offset.unsqueeze(2)], 2)
        grid = F.affine_grid(theta, [count, 1, height, width], align_corners=False)
        if self.elastic:
            knots = torch.randn(count, 2, _KNOTS, _KNOTS, generator=generator, **like) * (2 * self.elastic)
            field = F.interpolate(knots, (height, width), mode="bicubic", align_corners=True)
            grid = grid + field.permute(0, 2, 3, 1)
        return grid

    def _pen(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        how = torch.rand(len(images), 1, 1, 1, device=images.device, dtype=images.dtype, generator=generator)
        how = (how * 2 - 1) * self.thicken
        thick = F.max_pool2d(images, 3, 1, 1)
        thin = -F.max_pool2d(-images, 3, 1, 1)
        return torch.lerp(images, torch.where(how > 0, thick, thin), how.abs())


# found on Omniglot: as different as two people's drawings of a character
HANDWRITING = Augmentation(rotate=15, scale=0.2, shift=0.1, shear=0.25, elastic=0.03, thicken=0.5)
