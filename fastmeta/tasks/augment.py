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
_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a batch of images, each image with random numbers of its own; no loop over images.

    The geometric ones are one map of coordinates and one bilinear interpolation; what lies outside an image is 0.
    Those of colour are for images in [0, 1], and keep them there. With every value 0 the images come back as they are.

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
        flip: probability that left and right change places.
        brightness: all channels times a factor from U[max(0, 1 - brightness), 1 + brightness]. This and the next two
            are those of torchvision's ColorJitter, in this order.
        contrast: `f x + (1 - f) m` with a factor f as above, and m the mean luma of the whole image. The luma is
            0.299 R + 0.587 G + 0.114 B, and of images without three channels their mean.
        saturation: the same with m each pixel's own luma: nothing where there is one channel.

    Calling it with images `[B, C, H, W]`, floating or uint8 (of which 255 is 1.0), and a `generator` of their device
    (None: the global one) gives floating `[B, C, H, W]`, in the range of the images and 0.

    Raises:
        ValueError: a negative value, `crop` or `drop` of 1 or more, `thicken` or `flip` above 1; images of another
            shape.
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
    flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            below = 1 if field.name in ("crop", "drop") else None
            values.number(field.name, getattr(self, field.name), 0, below=below)
        for name in ("thicken", "flip"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} must be at most 1, got {getattr(self, name)}")

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        check_images(images, "[B, C, H, W]", 4, 4)
        values.generator("generator", generator, images.device)
        images = images.float().div_(255) if images.dtype == torch.uint8 else images
        if not images.numel():
            return images
        if self.flip:
            mirrored = self._draw(images, generator) < self.flip
            images = torch.where(mirrored, images.flip(-1), images)
        if self.rotate or self.scale or self.shift or self.shear or self.crop or self.elastic:
            grid = self._grid(images, generator)
            images = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        if self.thicken:
            images = self._pen(images, generator)
        if self.drop:
            shape = (len(images), 1, *images.shape[2:])
            images = images * (torch.rand(shape, device=images.device, generator=generator) >= self.drop)
        return self._colours(images, generator)

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
        how = (self._draw(images, generator) * 2 - 1) * self.thicken
        thick = F.max_pool2d(images, 3, 1, 1)
        thin = -F.max_pool2d(-images, 3, 1, 1)
        return torch.lerp(images, torch.where(how > 0, thick, thin), how.abs())

    def _colours(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        def factor(most: float) -> Tensor:
            low = max(0.0, 1 - most)
            return low + (1 + most - low) * self._draw(images, generator)

        if self.brightness:
            images = (images * factor(self.brightness)).clamp(0, 1)
        if self.contrast:
            mean = _luma(images).mean((-2, -1), keepdim=True)
            images = torch.lerp(mean, images, factor(self.contrast)).clamp(0, 1)
        if self.saturation and images.shape[1] > 1:
            images = torch.lerp(_luma(images), images, factor(self.saturation)).clamp(0, 1)
        return images

    @staticmethod
    def _draw(images: Tensor, generator: torch.Generator | None) -> Tensor:
        """A number from U[0, 1) for each image, `[B, 1, 1, 1]`."""
        return torch.rand(len(images), 1, 1, 1, device=images.device, dtype=images.dtype, generator=generator)


def _luma(images: Tensor) -> Tensor:
    """`[B, 1, H, W]`."""
    if images.shape[1] != len(_LUMA):
        return images.mean(1, keepdim=True)
    return (images * images.new_tensor(_LUMA).view(-1, 1, 1)).sum(1, keepdim=True)


# found on Omniglot: as different as two people's drawings of a character
HANDWRITING = Augmentation(rotate=15, scale=0.2, shift=0.1, shear=0.25, elastic=0.03, thicken=0.5)
