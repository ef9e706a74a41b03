"""Rows of examples: which kinds there are, what a model gets of them, and in what forms they may come."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmeta import values
from fastmeta.tasks.examples import Examples

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


def as_inputs(rows: Tensor) -> Tensor:
    """Rows as a model takes them: uint8, of which 255 is 1.0, as float32; floating ones as they are; other integers,
    which are token ids, as int64."""
    if rows.dtype == torch.uint8:
        return rows.float().div_(255)
    return rows if rows.is_floating_point() else rows.long()


def examples_of(images: Tensor | Sequence[Tensor] | Examples, name: str | None) -> Examples:
    """Examples from what `EpisodeSampler` takes. Of a tensor no row is copied; a list becomes one tensor."""
    if isinstance(images, Examples):
        _check("images", images.rows)
        return images if name is None else images.only(range(len(images)), name=name)
    name = "images" if name is None else values.name("name", name)
    if isinstance(images, (list, tuple)) and images and all(isinstance(one, Tensor) for one in images):
        counts = [len(_check(f"images[{i}]", one)) if one.dim() else 0 for i, one in enumerate(images)]
        first = images[0]
        for i, one in enumerate(images):
            if not counts[i] or one.shape[1:] != first.shape[1:]:
                like = f"[instances, {', '.join(map(str, first.shape[1:]))}] with an instance at least"
                raise ValueError(f"images[{i}] must have shape {like}, got {list(one.shape)}")
            if one.dtype != first.dtype or one.device != first.device:
                raise ValueError(
                    f"images must be of one dtype and device, got {values.dtype_of(first)} on {first.device} and, in "
                    f"images[{i}], {values.dtype_of(one)} on {one.device}"
                )
        rows = torch.cat(list(images))
    else:
        _check("images", images)
        if images.dim() < 3 or not images.shape[0] or not images.shape[1]:
            raise ValueError(
                "images must have shape [classes, instances, ...], at least one of each and rows of at least one "
                f"dimension, got {list(images.shape)}"
            )
        counts, rows = [images.shape[1]] * len(images), images.contiguous().flatten(0, 1)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return Examples(rows, labels, name=name)


def turned(examples: Examples) -> Examples:
    """Every class four times: as it is, and turned by 90, 180 and 270 degrees."""
    shape = examples.input_shape
    if len(shape) < 2 or shape[-2] != shape[-1]:
        raise ValueError(f"rotations need square images [C, H, W], and rows of {examples.name} are {list(shape)}")
    in_order = examples.rows[examples.order.to(examples.rows.device)]
    rows = torch.cat([in_order.rot90(turns, (-2, -1)) for turns in range(4)])
    counts = examples.counts.repeat(4)
    names = [*examples.names, *(f"{name}, turned {90 * turns}" for turns in (1, 2, 3) for name in examples.names)]
    groups = None if examples.groups is None else examples.groups * 4
    labels = torch.arange(len(counts)).repeat_interleave(counts)
    return Examples(rows, labels, names=names, groups=groups, name=examples.name)


def _check(name: str, rows: Tensor) -> Tensor:
    values.tensor(name, rows)
    if rows.dtype != torch.uint8 and rows.dtype not in _INTEGERS and not rows.is_floating_point():
        raise TypeError(f"{name} must be uint8, floating or integers, got {values.dtype_of(rows)}")
    return values.on_device(name, rows)
