"""Omniglot as torchmeta presents it, over `fastmeta.tasks.omniglot`: PIL images of 28 x 28, ink 255 on 0.

torchmeta's are of 105 x 105, which its usual transform `Resize(28)` makes smaller by a bilinear filter, where these are
averages over boxes. Nothing is unpacked into the folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from fastmeta.compat.torchmeta.utils.data import ClassDataset, CombinationMetaDataset, Dataset
from fastmeta.tasks.omniglot import ARCHIVES, characters, is_local

__all__ = ["Omniglot", "OmniglotClassDataset", "OmniglotDataset"]


class Omniglot(CombinationMetaDataset):
    """Tasks of `num_classes_per_task` characters.

    Args:
        root: folder that holds `images_background.zip` and `images_evaluation.zip`, itself or in `omniglot/`, where
            torchmeta leaves them; else the folder that FASTMETA_DATA names is taken.
        num_classes_per_task: ways.
        meta_train, meta_val, meta_test, meta_split: which characters; one flag, or a name.
        use_vinyals_split: 1028 / 172 / 423 characters (default), else those of the two archives, without "val".
        transform, target_transform: of an image, and of `(name of the character, augmentation)`.
        dataset_transform: of a task, such as `transforms.ClassSplitter`.
        class_augmentations: such as `[transforms.Rotation([90, 180, 270])]`.
        download: get the archives, to a cache folder, where they are missing.

    Raises:
        RuntimeError: the archives are missing, and `download` is False.
        ValueError: a meta-split that is none, or archives that are damaged.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        num_classes_per_task: int | None = None,
        meta_train: bool = False,
        meta_val: bool = False,
        meta_test: bool = False,
        meta_split: str | None = None,
        use_vinyals_split: bool = True,
        transform: Callable | None = None,
        target_transform: Callable | None = None,
        dataset_transform: Callable | None = None,
        class_augmentations: list | None = None,
        download: bool = False,
    ):
        dataset = OmniglotClassDataset(
            root,
            meta_train=meta_train,
            meta_val=meta_val,
            meta_test=meta_test,
            meta_split=meta_split,
            use_vinyals_split=use_vinyals_split,
            transform=transform,
            class_augmentations=class_augmentations,
            download=download,
        )
        super().__init__(
            dataset, num_classes_per_task, target_transform=target_transform, dataset_transform=dataset_transform
        )


class OmniglotClassDataset(ClassDataset):
    """The characters, sorted by the archive, the alphabet and the number; `labels` are these three."""

    folder = "omniglot"

    def __init__(
        self,
        root: str | os.PathLike,
        meta_train: bool = False,
        meta_val: bool = False,
        meta_test: bool = False,
        meta_split: str | None = None,
        use_vinyals_split: bool = True,
        transform: Callable | None = None,
        class_augmentations: list | None = None,
        download: bool = False,
    ):
        super().__init__(meta_train, meta_val, meta_test, meta_split, class_augmentations)
        if self.meta_val and not use_vinyals_split:
            raise ValueError("only the split of Vinyals has a \"val\": it needs `use_vinyals_split=True`")
        self.root = Path(root).expanduser()
        self.use_vinyals_split = use_vinyals_split
        self.transform = transform
        folder = self.root if is_local(self.root) else None
        if folder is None and not download and not is_local():
            raise RuntimeError(
                f"no Omniglot in {self.root}: put {' and '.join(ARCHIVES)} there, or say `download=True`"
            )
        images, names = characters(folder)
        index = {name: number for number, name in enumerate(names)}
        self.labels = [name.split("/") for name in self._chosen(names)]
        self.data = {name: images[index[name]].numpy() for name in map("/".join, self.labels)}

    def _chosen(self, names: Sequence[str]) -> list[str]:
        if not self.use_vinyals_split:
            archive = "images_background/" if self.meta_train else "images_evaluation/"
            chosen = [name for name in names if name.startswith(archive)]
        else:
            split = resources.files("fastmeta.tasks").joinpath(f"splits/vinyals_{self.meta_split}.txt")
            wanted = set(split.read_text().split())
            chosen = [name for name in names if name.split("/", 1)[1] in wanted]
        return sorted(chosen, key=lambda name: name.split("/"))

    @property
    def num_classes(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> OmniglotDataset:
        name = "/".join(self.labels[index % self.num_classes])
        return OmniglotDataset(
            index,
            self.data[name],
            name,
            transform=self.get_transform(index, self.transform),
            target_transform=self.get_target_transform(index),
        )

    def close(self) -> None:
        """Nothing is open."""


class OmniglotDataset(Dataset):
    """The 20 drawings of one character."""

    def __init__(
        self,
        index: int,
        data: np.ndarray,
        character_name: str,
        transform: Callable | None = None,
        target_transform: Callable | None = None,
    ):
        super().__init__(index, transform=transform, target_transform=target_transform)
        self.data = data
        self.character_name = character_name

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        from PIL import Image

        image, target = Image.fromarray(self.data[index]), self.character_name
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target
