"""Images in a folder for each class."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from fastmeta.compat.easyfsl.datasets.default_configs import DEFAULT_IMAGE_FORMATS, default_transform
from fastmeta.compat.easyfsl.datasets.few_shot_dataset import FewShotDataset


class EasySet(FewShotDataset):
    """The images that a JSON file names: `{"class_names": [...], "class_roots": [folder of each class, ...]}`.

    Args:
        specs_file: that file.
        image_size: side of the images that the default transform gives (default 84).
        transform: from a PIL image in RGB; default `default_transform`.
        training: which default transform (default False).
        supported_formats: suffixes of files that are images; default .bmp, .png, .jpeg and .jpg.

    Raises:
        ValueError: the file is no JSON, or has not as many names as folders.
    """

    def __init__(
        self,
        specs_file: Path | str,
        image_size: int = 84,
        transform: Callable | None = None,
        training: bool = False,
        supported_formats: set[str] | None = None,
    ):
        specs = self.load_specs(Path(specs_file))
        self.images, self.labels = self.list_data_instances(specs["class_roots"], supported_formats=supported_formats)
        self.class_names = specs["class_names"]
        self.transform = transform if transform else default_transform(image_size, training)

    @staticmethod
    def load_specs(specs_file: Path) -> dict:
        """What the JSON file says."""
        if specs_file.suffix != ".json":
            raise ValueError(f"an EasySet is said by a JSON file, got {specs_file}")
        with open(specs_file, encoding="utf-8") as file:
            specs = json.load(file)
        if "class_names" not in specs or "class_roots" not in specs:
            raise ValueError(f"{specs_file} must have class_names and class_roots, it has {sorted(specs)}")
        names, roots = specs["class_names"], specs["class_roots"]
        if len(names) != len(roots):
            raise ValueError(f"{specs_file} has {len(names)} class_names and {len(roots)} class_roots")
        return specs

    @staticmethod
    def list_data_instances(
        class_roots: Sequence[str], supported_formats: set[str] | None = None
    ) -> tuple[list[str], list[int]]:
        """The images in these folders, sorted, and the label of each."""
        formats = DEFAULT_IMAGE_FORMATS if supported_formats is None else supported_formats
        images, labels = [], []
        for label, root in enumerate(class_roots):
            found = [
                str(path) for path in sorted(Path(root).glob("*")) if path.is_file() and path.suffix.lower() in formats
            ]
            images += found
            labels += [label] * len(found)
        if not images:
            warnings.warn("the folders hold no images: the dataset is empty", UserWarning, stacklevel=2)
        return images, labels

    def __getitem__(self, item: int):
        from PIL import Image

        return self.transform(Image.open(self.images[item]).convert("RGB")), self.labels[item]

    def __len__(self) -> int:
        return len(self.labels)

    def get_labels(self) -> list[int]:
        return self.labels

    def number_of_classes(self) -> int:
        return len(self.class_names)
