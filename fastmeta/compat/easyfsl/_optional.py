"""Packages that only some calls need."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import ModuleType


def need(package: str, what: str) -> ModuleType:
    """The package, or an ImportError that says what it is for."""
    try:
        return importlib.import_module(package)
    except (ImportError, RuntimeError) as error:  # a torchvision that was built for another torch raises the second
        name = package.split(".")[0]
        raise ImportError(f"{what} needs {name}, one that goes with this torch: pip install {name}") from error


class Progress:
    """tqdm's bar over an iterable, or where tqdm is missing or not wanted none."""

    def __init__(self, iterable: Iterable, shown: bool = True, **options):
        self.bar = iterable
        self.has_bar = False
        if shown:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(iterable, **options)
            self.has_bar = True

    def __iter__(self):
        return iter(self.bar)

    def tell(self, **values) -> None:
        """Numbers behind the bar."""
        if self.has_bar:
            self.bar.set_postfix(**values)
