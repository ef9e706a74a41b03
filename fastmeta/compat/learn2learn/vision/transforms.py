"""Task transforms of images."""

from ..data._rotation import RandomClassRotation

__all__ = ["RandomClassRotation"]
