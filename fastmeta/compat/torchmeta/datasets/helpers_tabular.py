"""Data sets of tables already split into support and query sets."""

from __future__ import annotations

from collections.abc import Callable

from fastmeta.compat._absent import data_not_here
from fastmeta.compat.torchmeta.datasets.helpers import helper_with_default
from fastmeta.compat.torchmeta.transforms.tabular_transforms import NumpyToTorch
from fastmeta.compat.torchmeta.utils.data import CombinationMetaDataset

_absent = ["letter", "plants_texture", "plants_shape", "plants_margin", "bach"]
__all__ = list(_absent)
__getattr__ = data_not_here(
    __name__, "torchmeta 1.8.0", _absent, "Give `helper_with_default_tabular` a data set class of your own."
)


def helper_with_default_tabular(
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
    """`helpers.helper_with_default`, with `NumpyToTorch` where no transform is given."""
    defaults = {"transform": NumpyToTorch(), **(defaults or {})}
    return helper_with_default(klass, folder, shots, ways, shuffle, test_shots, seed, defaults, **kwargs)
