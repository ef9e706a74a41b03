"""Transforms of images that make new classes of the old. Iterating over one gives one for each new class."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import Tensor


class Rotation:
    """Turns a PIL image counter-clockwise by `angle` degrees; of a list of angles, one `Rotation` each by iterating.

    `resample`, `expand` and `center` are those of `PIL.Image.Image.rotate`; what comes in from outside is 0. Rotations
    by the same angle are equal.
    """

    def __init__(self, angle, resample=False, expand=False, center=None):
        several = isinstance(angle, (list, tuple))
        self._angles = angle if several else [angle]
        self.angle = None if several else angle
        if not several and angle % 360 == 0:
            warnings.warn(
                f"a rotation of {angle} degrees ({self}) makes classes that are there already",
                UserWarning,
                stacklevel=2,
            )
        self.resample = resample
        self.expand = expand
        self.center = center

    def __iter__(self) -> Iterator[Rotation]:
        return (type(self)(angle, self.resample, self.expand, self.center) for angle in self._angles)

    def __call__(self, image):
        if self.angle is None:
            raise ValueError(f"{self!r} has several angles: iterate over it")
        bands = len(image.getbands())
        return image.rotate(
            self.angle % 360,
            resample=int(self.resample),
            expand=self.expand,
            center=self.center,
            fillcolor=0 if bands == 1 else (0,) * bands,
        )

    def __eq__(self, other):
        if not isinstance(other, Rotation):
            return NotImplemented
        if self.angle is None or other.angle is None:
            return self._angles == other._angles
        return self.angle % 360 == other.angle % 360

    def __hash__(self):
        return hash(repr(self))

    def __repr__(self):
        return str(self) if self.angle is None else f"Rotation({self.angle % 360})"

    def __str__(self):
        return f"Rotation({', '.join(map(str, self._angles))})"


class _Flip:
    axis: int  # from the end, of a tensor

    def __iter__(self):
        return iter([type(self)()])

    def __call__(self, image):
        if isinstance(image, Tensor):
            return image.flip(self.axis)
        from PIL.Image import Transpose

        return image.transpose(Transpose.FLIP_LEFT_RIGHT if self.axis == -1 else Transpose.FLIP_TOP_BOTTOM)

    def __repr__(self):
        return f"{type(self).__name__}()"


class HorizontalFlip(_Flip):
    """Left for right, of a PIL image or a tensor `[..., H, W]`."""

    axis = -1


class VerticalFlip(_Flip):
    """Top for bottom, of a PIL image or a tensor `[..., H, W]`."""

    axis = -2
