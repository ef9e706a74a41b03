"""Tasks whose samples are rows of tensors: loaded by one indexing, to the same values as sample by sample."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ._description import DataDescription
from ._rotation import Rotated, turned
from .meta_dataset import FilteredMetaDataset, MetaDataset
from .transforms import Loaded, Numbered, RemapLabels
from .utils import OnDeviceDataset


def gathered(tasks: Sequence[Sequence[DataDescription]]) -> tuple[Tensor, Tensor] | None:
    """Samples `[T, B, ...]` and labels `[T, B]` of descriptions; None where they are no rows of tensors, or where a
    transform is none of those that this knows."""
    rows = len(tasks[0])
    if not rows or any(len(task) != rows for task in tasks):
        return None
    chains = [_chain(task) for task in tasks]
    if None in chains:
        return None
    load = chains[0][0]
    found = _tensors(load.dataset)
    numbered = chains[0][1] is not None
    alike = all(chain[0].dataset is load.dataset and (chain[1] is not None) == numbered for chain in chains)
    if found is None or not alike:
        return None
    (data, labels), places = found
    index = [d.index for task in tasks for d in task]
    at = torch.tensor(index if places is None else [places[i] for i in index])
    data = data[at.to(data.device)].unflatten(0, (len(tasks), rows))
    labels = labels[at.to(labels.device)].unflatten(0, (len(tasks), rows))
    if numbered:
        numbers = [_numbers(mapping, row) for (_, mapping, _), row in zip(chains, labels.tolist(), strict=True)]
        labels = torch.tensor(numbers)
    for t, (_, _, turns) in enumerate(chains):
        for degrees in set(turns) - {0}:
            where = torch.tensor([own == degrees for own in turns], device=data.device)
            data[t, where] = turned(data[t, where], degrees)
    return data, labels


def _numbers(mapping: Numbered, labels: list) -> list:
    place = {label: i for i, label in enumerate(mapping.labels)}
    return [place[label] for label in labels]


def _chain(task: Sequence[DataDescription]) -> tuple[Loaded, Numbered | None, list[float]] | None:
    """What loads all samples of a task, what numbers their labels, and by how much each is turned; None where it is
    more than that."""
    load, mapping = task[0].transforms[:1], None
    if not load or type(load[0]) is not Loaded:
        return None
    turns = []
    for which, description in enumerate(task):
        first, *others = description.transforms or [None]
        if first is not load[0]:
            return None
        own, turn = None, 0.0
        for other in others:
            if type(other) is Rotated and not turn:
                turn = other.degrees
            elif own is None and type(other) is functools.partial and _remaps(other):
                own = other.keywords["mapping"]
            else:
                return None
        if which and own is not mapping:
            return None
        mapping = own
        turns.append(turn)
    return load[0], mapping, turns


def _remaps(transform: functools.partial) -> bool:
    plain = getattr(transform.func, "__func__", None) is RemapLabels.remap
    return plain and type(transform.keywords.get("mapping")) is Numbered


def _tensors(dataset) -> tuple[tuple[Tensor, Tensor], list[int] | None] | None:
    """The two tensors that a data set indexes, and where its samples are in them."""
    places = None
    while type(dataset) in (MetaDataset, FilteredMetaDataset):
        if type(dataset) is FilteredMetaDataset:
            true = dataset.to_true_indices
            places = true if places is None else [true[i] for i in places]
        dataset = dataset.dataset
    plain = type(dataset) is TensorDataset or type(dataset) is OnDeviceDataset and dataset.transform is None
    if not plain or len(dataset.tensors) != 2 or dataset.tensors[1].dim() != 1:
        return None
    return dataset.tensors, places
