"""Toy problems already split into support and query sets."""

from __future__ import annotations

import warnings

from fastmeta.compat.torchmeta.toy.harmonic import Harmonic
from fastmeta.compat.torchmeta.toy.sinusoid import Sinusoid
from fastmeta.compat.torchmeta.transforms import ClassSplitter

__all__ = ["harmonic", "sinusoid"]


def sinusoid(shots: int, shuffle: bool = True, test_shots: int | None = None, seed: int | None = None, **kwargs):
    """`Sinusoid(**kwargs)`, whose tasks are dicts of "train", `shots` examples, and "test", `test_shots`.

    Args:
        shots: examples in "train".
        shuffle: draw them (default), else take the first.
        test_shots: examples in "test"; None (default) for as many as in "train".
        seed: of the data set and the splitter.
        kwargs: of `Sinusoid`. `num_samples_per_task` goes before `shots`, with a warning.

    Raises:
        ValueError: `num_samples_per_task` leaves none for "train".
    """
    return _split(Sinusoid, shots, shuffle, test_shots, seed, kwargs)


def harmonic(shots: int, shuffle: bool = True, test_shots: int | None = None, seed: int | None = None, **kwargs):
    """`Harmonic(**kwargs)`; else as `sinusoid`."""
    return _split(Harmonic, shots, shuffle, test_shots, seed, kwargs)


def _split(kind, shots, shuffle, test_shots, seed, kwargs):
    samples = kwargs.pop("num_samples_per_task", None)
    if samples is not None:
        warnings.warn(
            "both `shots` and `num_samples_per_task` say the number of examples: `shots` is ignored", stacklevel=3
        )
        shots = samples // 2 if test_shots is None else samples - test_shots
        if shots <= 0:
            raise ValueError(f"`test_shots` ({test_shots}) leaves none of {samples} samples per task for training")
    if test_shots is None:
        test_shots = shots
    dataset = kind(num_samples_per_task=shots + test_shots, **kwargs)
    dataset = ClassSplitter(dataset, shuffle=shuffle, num_train_per_class=shots, num_test_per_class=test_shots)
    dataset.seed(seed)
    return dataset
