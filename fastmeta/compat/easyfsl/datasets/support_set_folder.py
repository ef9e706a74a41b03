"""A support set of the images in a folder's folders."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastmeta.compat.easyfsl.datasets.default_configs import default_transform

NOT_A_TENSOR_ERROR_MESSAGE = "A SupportSetFolder holds tensors: the transform must give one."
_FORMATS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class SupportSetFolder(Dataset):
    """All images below `root`, whose folders are the classes; read at once. With what torchvision's `ImageFolder` has,
    of which easyfsl's is a subclass: `classes`, `class_to_idx`, `samples`, `imgs`, `targets`.

    Args:
        root: folder of folders of images.
        device: of `get_images` and `get_labels` (default "cpu").
        image_size: side of the images that the default transform gives (default 84).
        transform: from a PIL image in RGB to a tensor; default `default_transform` of an evaluation.
        target_transform: of the labels in `self[i]`.
        loader: from a path to an image; default PIL, in RGB.
        is_valid_file: whether a path is an image; default by its suffix.

    Raises:
        FileNotFoundError: no folder in `root`, or one without images.
        TypeError: a transform that gives no tensors.
    """

    def __init__(
        self,
        root: str | Path,
        device: torch.device | str = "cpu",
        image_size: int = 84,
        transform: Callable | None = None,
        target_transform: Callable | None = None,
        loader: Callable | None = None,
        is_valid_file: Callable[[str], bool] | None = None,
    ):
        self.root = str(root)
        self.transform = transform if transform else default_transform(image_size, training=False)
        self.target_transform = target_transform
        self.loader = loader or _read
        self.classes = sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir())
        if not self.classes:
            raise FileNotFoundError(f"{self.root} holds no folder, of which each would be a class")
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        is_image = is_valid_file or (lambda path: path.lower().endswith(_FORMATS))
        self.samples = [
            (path, label) for name, label in self.class_to_idx.items() for path in self._images_of(name, is_image)
        ]
        self.imgs = self.samples
        self.targets = [label for _, label in self.samples]
        self.device = device
        try:
            self.images = torch.stack([self[index][0] for index in range(len(self))]).to(device)
        except TypeError as error:
            raise TypeError(NOT_A_TENSOR_ERROR_MESSAGE) from error

    def _images_of(self, name: str, is_image: Callable[[str], bool]) -> list[str]:
        folder = os.path.join(self.root, name)
        walked = sorted(os.walk(folder, followlinks=True))
        found = [path for inside, _, files in walked for path in (os.path.join(inside, f) for f in sorted(files))]
        if not (found := [path for path in found if is_image(path)]):
            raise FileNotFoundError(f"{folder} holds no image")
        return found

    def __getitem__(self, index: int):
        path, label = self.samples[index]
        image = self.transform(self.loader(path))
        return image, label if self.target_transform is None else self.target_transform(label)

    def __len__(self) -> int:
        return len(self.samples)

    def get_images(self) -> Tensor:
        """`[S, C, H, W]`, on the device."""
        return self.images

    def get_labels(self) -> Tensor:
        """`[S]`, on the device."""
        return torch.tensor(self.targets).to(self.device)


def _read(path: str):
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")
