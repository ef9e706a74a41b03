"""Images of a class turned alike."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor


class Rotated:
    """Turns the first entry of a sample by `degrees`, counter-clockwise."""

    def __init__(self, degrees: float):
        self.degrees = degrees

    def __call__(self, data):
        return turned(data[0], self.degrees), data[1]


class RandomClassRotation:
    """A task transform: each class of the task draws one of `degrees`, by which all its images are turned.

    Images are tensors `[..., H, W]` or PIL images; the canvas keeps its size, corners are 0, the nearest pixel counts.
    Where it differs from 0.2.0: there all images of a task are turned by what the last class drew.

    Args:
        dataset: the `MetaDataset` of the task.
        degrees: angles to draw from, counter-clockwise.
    """

    def __init__(self, dataset, degrees):
        self.dataset = dataset
        self.degrees = degrees

    def __call__(self, task_description):
        drawn = {}
        for description in task_description:
            label = self.dataset.indices_to_labels[description.index]
            if label not in drawn:
                drawn[label] = Rotated(random.choice(self.degrees))
            description.transforms.append(drawn[label])
        return task_description


def turned(image, degrees: float):
    """`image` turned counter-clockwise."""
    if not isinstance(image, Tensor):
        return image.rotate(degrees)
    height, width = image.shape[-2:]
    quarters, rest = divmod(degrees, 90)
    if rest == 0 and (height == width or quarters % 2 == 0):
        return torch.rot90(image, int(quarters) % 4, (-2, -1))
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    y = torch.arange(height, device=image.device).unsqueeze(1) - (height - 1) / 2
    x = torch.arange(width, device=image.device) - (width - 1) / 2
    row = (x * sin + y * cos + height / 2).floor().long()
    column = (x * cos - y * sin + width / 2).floor().long()
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    taken = image[..., row.clamp(0, height - 1), column.clamp(0, width - 1)]
    return torch.where(inside, taken, torch.zeros((), dtype=image.dtype, device=image.device))
