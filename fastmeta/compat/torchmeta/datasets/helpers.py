"""Data sets already split into support and query sets."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from fastmeta.compat._absent import data_not_here
from fastmeta.compat.torchmeta.datasets.omniglot import Omniglot
from fastmeta.compat.torchmeta.transforms import Categorical, ClassSplitter, Rotation
from fastmeta.compat.torchmeta.utils.data import CombinationMetaDataset

__all__ = ["omniglot"]
__getattr__ = data_not_here(
    __name__,
    "torchmeta 1.8.0",
    ["cifar_fs", "cub", "doublemnist", "fc100", "miniimagenet", "pascal5i", "tieredimagenet", "triplemnist"],
    "Give `helper_with_default` a data set class of your own.",
)


def to_tensor(image) -> Tensor:
    """A PIL image as `[C, H, W]` in [0, 1], of the default dtype, as torchvision's `ToTensor` gives it."""
    import numpy as np

    pixels = torch.from_numpy(np.array(image)) / 255
    return pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1).contiguous()


def helper_with_default(
    klass: Callable[..., CombinationMetaDataset],
    folder: str,
    shots: int,
    ways: int,
    shuffle: bool = True,
    test_shots: int | None = None,
    seed: int | None = None,
    defaults: dict | None = None,
    **kwargs,
) -> CombinationMetaDataset:
    """`klass(folder, num_classes_per_task=ways, **kwargs)`, split.

    Where they are not in `kwargs`, `transform`, `target_transform` and `class_augmentations` are those of `defaults`,
    and where they are not there `to_tensor`, `Categorical(ways)` and None. The other arguments are those of `omniglot`.
    """
    if "num_classes_per_task" in kwargs:
        warnings.warn("both `ways` and `num_classes_per_task` are given: `ways` is ignored", stacklevel=2)
        ways = kwargs.pop("num_classes_per_task")
    usual = {"transform": to_tensor, "target_transform": Categorical(ways), "class_augmentations": None}
    dataset = klass(folder, num_classes_per_task=ways, **{**usual, **(defaults or {}), **kwargs})
    dataset = ClassSplitter(
        dataset,
        shuffle=shuffle,
        num_train_per_class=shots,
        num_test_per_class=shots if test_shots is None else test_shots,
    )
    dataset.seed(seed)
    return dataset


def omniglot(
    folder: str,
    shots: int,
    ways: int,
    shuffle: bool = True,
    test_shots: int | None = None,
    seed: int | None = None,
    **kwargs,
) -> Omniglot:
    """`Omniglot` in tasks that are dicts of "train" and "test", with rotations by 90, 180 and 270 degrees as classes.

    Args:
        folder: where the archives lie; see `Omniglot`.
        shots: examples of each class in "train".
        ways: classes of a task.
        shuffle: draw the examples (default), else take the first.
        test_shots: examples of each class in "test"; None (default) for as many as in "train".
        seed: of the data set and the splitter.
        kwargs: of `Omniglot`. By default images are `[1, 28, 28]` in [0, 1], and targets `Categorical(ways)`.
    """
    defaults = {"class_augmentations": [Rotation([90, 180, 270])]}
    return helper_with_default(
        Omniglot,
        folder,
        shots,
        ways,
        shuffle=shuffle,
        test_shots=test_shots,
        seed=seed,
        defaults=defaults,
        **kwargs,
    )
