"""Data sets of other libraries: `torch.utils.data.Dataset` and Hugging Face `datasets.Dataset`."""

from __future__ import annotations

from typing import Any

from fastmeta.tasks.examples import Examples


def dataset(
    data: Any,
    *,
    image: str | None = None,
    label: str | None = None,
    image_size: int | None = None,
    grey: bool = False,
    name: str | None = None,
) -> Examples:
    """Examples from any labelled data set, each item read once, into memory.

    Args:
        data: a map-style `torch.utils.data.Dataset` whose items are `(x, y)`, of which torchvision's are, or
            dictionaries; or a Hugging Face `datasets.Dataset`, which is one split. `x` is a tensor, an array, a list of
            numbers or a Pillow image (uint8 `[1 or 3, H, W]` then), `y` an integer or a text.
        image, label: columns of a Hugging Face data set, or keys of dictionaries; default the first of type Image, else
            `image`, `img`, `x` or `features`; and the first of type ClassLabel, else `label`, `labels`, `y` or
            `fine_label`.
        image_size: the side that Pillow images are brought to, as `folder` does it; default None, as they are.
        grey: Pillow images in one channel. Default: only those that are grey.
        name: of the examples; default the class of the data set.

    Classes are called as `data.classes` says, or the label column's feature, where there is one.

    Raises:
        TypeError, ValueError: a data set without length, items that are no pair or differ in shape, by number; columns
            that are not there.
    """
    return Examples.from_dataset(data, image=image, label=label, image_size=image_size, grey=grey, name=name)
