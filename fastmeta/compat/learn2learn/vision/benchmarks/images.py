"""Tasks of characters: Omniglot's, and drawn ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fastmeta.tasks import load_images

from ...data import transforms
from ...data.meta_dataset import MetaDataset
from ..datasets.full_omniglot import archives

SPLITS = ("train", "val", "test")
TURNS = [0.0, 90.0, 180.0, 270.0]


def omniglot_tasksets(train_ways, train_samples, test_ways, test_samples, root, device=None, **kwargs):
    """Data sets and task transforms of Omniglot: 1,100 characters for training, 100 for validation, 423 for test."""
    folder = archives(root)[0].parent
    images = [load_images("omniglot", split, data_root=folder, partition="1200") for split in SPLITS]
    return _tasksets(images, (train_ways, train_samples), (test_ways, test_samples), device)


def glyphs_tasksets(train_ways, train_samples, test_ways, test_samples, root, device=None, **kwargs):
    """Data sets and task transforms of `fastmeta.tasks.glyphs`, which are drawn here, and need no data."""
    images = [load_images("glyphs", split) for split in SPLITS]
    return _tasksets(images, (train_ways, train_samples), (test_ways, test_samples), device)


def _tasksets(images: list[Tensor], train: tuple[int, int], test: tuple[int, int], device) -> tuple[list, list]:
    datasets, first = [], 0
    for of_split in images:
        datasets.append(_numbered(of_split, first, device))
        first += len(of_split)
    sizes = train, test, test
    return datasets, [_transforms(dataset, *size) for dataset, size in zip(datasets, sizes, strict=True)]


def _numbered(images: Tensor, first: int, device) -> MetaDataset:
    """Classes `[C, B, 1, H, W]` of uint8 as float32 samples `[1, H, W]` in [0, 1] with labels from `first` on."""
    classes, each = images.shape[:2]
    labels = torch.arange(first, first + classes).repeat_interleave(each)
    return MetaDataset(TensorDataset(images.flatten(0, 1).to(device).float().div_(255), labels.to(device)))


def _transforms(dataset: MetaDataset, ways: int, samples: int) -> list:
    return [
        transforms.FusedNWaysKShots(dataset, n=ways, k=samples),
        transforms.LoadData(dataset),
        transforms.RemapLabels(dataset),
        transforms.ConsecutiveLabels(dataset),
        transforms.RandomClassRotation(dataset, TURNS),
    ]
