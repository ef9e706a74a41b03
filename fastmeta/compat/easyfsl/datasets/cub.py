"""CUB, of images that are there already."""

from __future__ import annotations

from pathlib import Path

from fastmeta.compat.easyfsl.datasets.easy_set import EasySet

CUB_SPECS_DIR = Path("data/CUB")


class CUB(EasySet):
    """The `EasySet` of `data/CUB/SPLIT.json`, from where the program runs; `kwargs` are its.

    Raises:
        ValueError: there is no such file.
    """

    def __init__(self, split: str, **kwargs):
        specs_file = CUB_SPECS_DIR / f"{split}.json"
        if not specs_file.is_file():
            raise ValueError(f"no {specs_file}, which would say where the images of {split!r} are")
        super().__init__(specs_file=specs_file, **kwargs)
