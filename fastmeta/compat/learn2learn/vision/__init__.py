"""Data sets of images, tasks made of them, networks for them."""

from . import benchmarks, datasets, models, transforms

__all__ = ["benchmarks", "datasets", "models", "transforms"]
