"""Omniglot's drawings as they were published."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

from torch.utils.data import Dataset

from fastmeta.tasks.omniglot import find_archives


class FullOmniglot(Dataset):
    """All 32,460 drawings of 1,623 characters: pairs of a PIL image ("L", 105 x 105, black on white) and the number of
    its character, 0 to 963 in the background set, 964 to 1622 in the evaluation set, each in the order of their names.

    Args:
        root: the folder that holds `images_background.zip` and `images_evaluation.zip`, itself or in `omniglot-py/` or
            `omniglot/`. Where it holds none of them, FASTMETA_DATA names the folder; without that they are downloaded
            into fastmeta's cache.
        transform, target_transform: applied to image and number; default none.
        download: nothing is written to `root` in any case; False by default, where without the archives RuntimeError is
            raised.

    Where it differs from 0.2.0: it needs no torchvision, and writes no file beside the data.
    """

    def __init__(self, root, transform=None, target_transform=None, download: bool = False):
        self.root = os.path.expanduser(root)
        self.transform = transform
        self.target_transform = target_transform
        self._drawings: list[bytes] = []
        self._labels: list[int] = []
        for path in archives(self.root, download):
            with zipfile.ZipFile(path) as archive:
                names = sorted(name for name in archive.namelist() if name.endswith(".png"))
                characters = sorted({name.rsplit("/", 1)[0] for name in names})
                first = self._labels[-1] + 1 if self._labels else 0
                number = {character: first + i for i, character in enumerate(characters)}
                self._drawings += map(archive.read, names)
                self._labels += [number[name.rsplit("/", 1)[0]] for name in names]

    def labels_at_once(self) -> list:
        number = self.target_transform
        return self._labels if number is None else [number(label) for label in self._labels]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, item):
        from PIL import Image

        image, label = Image.open(io.BytesIO(self._drawings[item])).convert("L"), self._labels[item]
        if self.transform:
            image = self.transform(image)
        if self.target_transform:
            label = self.target_transform(label)
        return image, label


def archives(root, download: bool = True) -> tuple[Path, ...]:
    """Omniglot's two archives, in `root` or wherever fastmeta finds them.

    Raises:
        RuntimeError: they would have to be downloaded, and are not to be.
        ValueError: one of them is missing, or cannot be downloaded.
    """
    folders = [Path(root), Path(root) / "omniglot", Path(root) / "omniglot-py"]
    for folder in folders:
        if (folder / "images_background.zip").is_file():
            return find_archives(folder)
    if not download and "FASTMETA_DATA" not in os.environ:
        raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
    return find_archives(None)
