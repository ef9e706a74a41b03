"""How images are read by default."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmeta.compat.easyfsl._optional import need

IMAGENET_NORMALIZATION = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
DEFAULT_IMAGE_FORMATS = {".bmp", ".png", ".jpeg", ".jpg"}


def default_transform(image_size: int, training: bool) -> Callable:
    """From a PIL image to a tensor `[3, image_size, image_size]` of the default dtype, normalised as for ImageNet.

    Without `training` a resize to 1.15 times the size and the middle of it; with it a random crop, colours and mirror,
    for which torchvision is needed.
    """
    if not training:
        return CentreOfResized(image_size)
    transforms = need("torchvision.transforms", "the default transform of a training set")
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(image_size),
            transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(**IMAGENET_NORMALIZATION),
        ]
    )


class CentreOfResized:
    """What torchvision's Resize, CenterCrop, ToTensor and Normalize give."""

    def __init__(self, image_size: int):
        self.image_size = image_size

    def __call__(self, image) -> Tensor:
        import numpy as np
        from PIL.Image import Resampling

        large = int(self.image_size * 1.15)
        first = round((large - self.image_size) / 2)
        box = (first, first, first + self.image_size, first + self.image_size)
        small = image.resize((large, large), Resampling.BILINEAR).crop(box)
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous() / 255
        mean, std = (torch.tensor(IMAGENET_NORMALIZATION[key]).view(3, 1, 1) for key in ("mean", "std"))
        return (pixels - mean) / std

    def __repr__(self):
        return f"{type(self).__name__}({self.image_size})"
