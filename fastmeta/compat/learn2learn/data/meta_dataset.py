"""Classification data sets that know which samples have which label."""

from __future__ import annotations

import bisect
import itertools
import os
import pickle
from collections import defaultdict

from torch.utils.data import Dataset, TensorDataset


class MetaDataset(Dataset):
    """A data set with an index of its labels.

    `labels_to_indices` maps a label to the indices of its samples, `indices_to_labels` an index to its label, `labels`
    lists the labels in the order of their first samples. If the data set has an attribute `_bookkeeping_path`, all
    three are read from that file, or written there.

    Args:
        dataset: pairs `(sample, label)`, the label a scalar; a tensor counts as its number.
        labels_to_indices: given, nothing is looked up in the data set.
        indices_to_labels: likewise.

    Raises:
        TypeError: a `dataset` that is no `torch.utils.data.Dataset`.
        ValueError: labels that are no scalars.
    """

    def __init__(self, dataset, labels_to_indices=None, indices_to_labels=None):
        if not isinstance(dataset, Dataset):
            raise TypeError("MetaDataset only accepts a torch dataset as input")
        self.dataset = dataset
        if hasattr(dataset, "_bookkeeping_path"):
            self.load_bookkeeping(dataset._bookkeeping_path)
        else:
            self.create_bookkeeping(labels_to_indices, indices_to_labels)

    def __getitem__(self, item):
        return self.dataset[item]

    def __len__(self) -> int:
        return len(self.dataset)

    def create_bookkeeping(self, labels_to_indices=None, indices_to_labels=None) -> None:
        """Make the index, of either half of it where one is given, else by a look at every sample."""
        assert hasattr(self.dataset, "__getitem__"), "Requires iterable-style dataset."
        if labels_to_indices is not None:
            indices_to_labels = {i: label for label, indices in labels_to_indices.items() for i in indices}
        else:
            if indices_to_labels is None:
                indices_to_labels = defaultdict(int, enumerate(_labels_of(self.dataset)))
            labels_to_indices = defaultdict(list)
            for i, label in indices_to_labels.items():
                labels_to_indices[label].append(i)
        self._keep(labels_to_indices, indices_to_labels)

    def _keep(self, labels_to_indices, indices_to_labels) -> None:
        self.labels_to_indices = labels_to_indices
        self.indices_to_labels = indices_to_labels
        self.labels = list(labels_to_indices)
        self._bookkeeping = {
            "labels_to_indices": labels_to_indices,
            "indices_to_labels": indices_to_labels,
            "labels": self.labels,
        }

    def load_bookkeeping(self, path) -> None:
        """Read the index from the pickle at `path`, or make it and write it there."""
        if not os.path.exists(path):
            self.create_bookkeeping()
            self.serialize_bookkeeping(path)
            return
        with open(path, "rb") as file:
            kept = pickle.load(file)
        self._keep(kept["labels_to_indices"], kept["indices_to_labels"])
        self.labels = kept["labels"]

    def serialize_bookkeeping(self, path) -> None:
        """Write the index as a pickle."""
        with open(path, "wb") as file:
            pickle.dump(self._bookkeeping, file, protocol=-1)


def _labels_of(dataset) -> list:
    """The label of every sample, without loading the samples where that can be."""
    if hasattr(dataset, "labels_at_once"):
        return dataset.labels_at_once()
    tensors = dataset.tensors if isinstance(dataset, TensorDataset) else ()
    if type(dataset) is TensorDataset and len(tensors) > 1 and tensors[1].dim() == 1:
        return tensors[1].tolist()
    labels = []
    for i in range(len(dataset)):
        label = dataset[i][1]
        try:
            labels.append(label.item() if hasattr(label, "item") else label)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"Requires scalar labels. \n{error}") from error
    return labels


class UnionMetaDataset(MetaDataset):
    """The samples of several data sets, one after the other, with labels numbered anew: each data set's in the order of
    its `labels`, behind those of the ones before. The same label in two data sets is two labels.

    Args:
        datasets: data sets of any kind that `MetaDataset` takes.
    """

    def __init__(self, datasets):
        self.datasets = [ds if isinstance(ds, MetaDataset) else MetaDataset(ds) for ds in datasets]
        labels_to_indices, indices_to_labels = defaultdict(list), defaultdict(int)
        first_label = first_index = 0
        for dataset in self.datasets:
            number = {label: first_label + i for i, label in enumerate(dataset.labels)}
            for i, label in dataset.indices_to_labels.items():
                indices_to_labels[first_index + i] = number[label]
                labels_to_indices[number[label]].append(first_index + i)
            first_index += len(dataset.indices_to_labels)
            first_label += len(dataset.labels_to_indices)
        self._keep(labels_to_indices, indices_to_labels)
        self._ends = list(itertools.accumulate(map(len, self.datasets)))

    def __getitem__(self, item):
        if not 0 <= item < len(self):
            raise IndexError(f"the union has {len(self)} samples, none at {item}")
        which = bisect.bisect_right(self._ends, item)
        data = list(self.datasets[which][item - (self._ends[which - 1] if which else 0)])
        data[1] = self.indices_to_labels[item]
        return data

    def __len__(self) -> int:
        return len(self.indices_to_labels)


class FilteredMetaDataset(MetaDataset):
    """The samples of a data set that have one of `labels`, which they keep; ordered as `labels` are.

    Args:
        dataset: any that `MetaDataset` takes.
        labels: those to keep; those without samples are passed over.
    """

    def __init__(self, dataset, labels):
        self.dataset = dataset if isinstance(dataset, MetaDataset) else MetaDataset(dataset)
        self.to_true_indices = []
        labels_to_indices, indices_to_labels = defaultdict(list), defaultdict(int)
        for label in labels:
            for true_index in self.dataset.labels_to_indices.get(label, ()):
                i = len(self.to_true_indices)
                self.to_true_indices.append(true_index)
                labels_to_indices[label].append(i)
                indices_to_labels[i] = self.dataset.indices_to_labels[true_index]
        self._keep(labels_to_indices, indices_to_labels)

    def __getitem__(self, item):
        return self.dataset[self.to_true_indices[item]]

    def __len__(self) -> int:
        return len(self.to_true_indices)
