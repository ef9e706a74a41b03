"""One store of examples by class: where a sampler's rows come from, whatever they are."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from fastmeta import values
from fastmeta.tasks import store


class Examples:
    """Rows of any shape and dtype, and the class of each. Classes may be of unequal size.

    Args:
        rows: `[R, ...]`: images uint8 (of which 255 is 1.0) or floating, feature vectors, sequences, token ids. They
            stay where they are, in memory or mapped from a file, in the order that they have.
        labels: the class of each row: int64 `[R]`, or `R` of anything that can be told apart (strings, say).
        names: of the classes, in the order of the labels' sorted values; default what the labels are, as text.
        groups: for each class its super-class, where there are some: what a split keeps together.
        name: of the whole, for messages.

    Attributes:
        rows: as given.
        order: int64 `[R]`, which rows are of class 0, then of class 1, and so on.
        offsets: int64 `[C + 1]`: rows `order[offsets[c] : offsets[c + 1]]` are those of class `c`.
        names: `C` strings. groups: `C` strings, or None.
        mapped: whether the rows are mapped from a file, as `load` leaves them.

    Raises:
        TypeError, ValueError: rows that are no tensor, labels or names of another number, no row at all.
    """

    def __init__(
        self,
        rows: Tensor,
        labels: Tensor | Sequence[Hashable],
        *,
        names: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
        name: str = "examples",
    ):
        values.tensor("rows", rows)
        if rows.dim() < 1 or not len(rows):
            raise ValueError(f"rows must have shape [R, ...] with R of at least 1, got {list(rows.shape)}")
        classes, label = _numbered(labels)
        if len(label) != len(rows):
            raise ValueError(f"labels must be one of each row: {len(label)} labels, {len(rows)} rows")
        names = [str(one) for one in (classes if names is None else names)]
        for what, given in (("names", names), ("groups", groups)):
            if given is not None and len(given) != len(classes):
                raise ValueError(f"{what} must be one of each class: {len(given)} {what}, {len(classes)} classes")
        self.rows, self.name, self.mapped = rows, name, False
        self.names = tuple(names)
        self.groups = None if groups is None else tuple(map(str, groups))
        self.order = label.argsort(stable=True)
        counts = label.bincount(minlength=len(classes))
        self.offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    @classmethod
    def from_dataset(
        cls,
        data: Any,
        *,
        image: str | None = None,
        label: str | None = None,
        image_size: int | None = None,
        grey: bool = False,
        name: str | None = None,
    ) -> Examples:
        """Examples from a labelled `torch.utils.data.Dataset` or a Hugging Face `datasets.Dataset`. Arguments and
        errors as of `fastmeta.tasks.read.dataset`."""
        from fastmeta.tasks.read._items import items_of

        name = type(data).__name__ if name is None else name
        rows, labels, names = items_of(data, image, label, image_size, grey, name)
        return cls(rows, labels, names=names, name=name)

    @property
    def counts(self) -> Tensor:
        """Rows of each class, int64 `[C]`."""
        return self.offsets.diff()

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.rows.shape[1:])

    @property
    def labels(self) -> Tensor:
        """The class of each row, int64 `[R]`, in the order of `rows`; -1 of rows that are of none."""
        label = self.order.new_full((len(self.rows),), -1)
        label[self.order] = torch.arange(len(self.names)).repeat_interleave(self.counts)
        return label

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.names)

    def of_class(self, index: int) -> Tensor:
        """Rows `[count, ...]` of a class."""
        return self.rows[self.order[self.offsets[index] : self.offsets[index + 1]]]

    def only(self, classes: Iterable[int], *, name: str | None = None) -> Examples:
        """The examples of some classes, by number. Rows are not copied."""
        classes = list(classes)
        if not classes:
            raise ValueError(f"classes must be at least one of the {len(self)} of {self.name}, got none")
        for one in classes:
            if not 0 <= values.count("classes", one, 0) < len(self):
                raise ValueError(f"classes must be numbers from 0 to {len(self) - 1}, got {one}")
        if len(set(classes)) < len(classes):
            raise ValueError(f"classes must differ: {max(classes, key=classes.count)} stands there twice")
        found = object.__new__(Examples)
        found.rows, found.name, found.mapped = self.rows, self.name if name is None else name, self.mapped
        found.names = tuple(self.names[c] for c in classes)
        found.groups = None if self.groups is None else tuple(self.groups[c] for c in classes)
        found.order = torch.cat([self.order[self.offsets[c] : self.offsets[c + 1]] for c in classes])
        counts = self.counts[classes]
        found.offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return found

    def to(self, device: torch.device | str) -> Examples:
        """The same with rows on `device`; of them only those in use."""
        found = self.only(range(len(self)))
        kept = self.order.sort().values
        found.rows = self.rows[kept.to(self.rows.device)] if len(kept) < len(self.rows) else self.rows
        found.rows, found.mapped = found.rows.to(device), False
        found.order = torch.searchsorted(kept, self.order)
        return found

    def over(self, rows: Tensor, *, name: str | None = None) -> Examples:
        """The same classes with other rows `[len(order), ...]`, such as embeddings, given in the order of classes."""
        values.tensor("rows", rows)
        if rows.dim() < 1 or len(rows) != len(self.order):
            raise ValueError(f"rows must be {len(self.order)}, as many as {self.name} has, got {list(rows.shape)}")
        found = self.only(range(len(self)), name=name)
        found.rows, found.order, found.mapped = rows, torch.arange(len(rows)), False
        return found

    def save(self, path: str | PathLike) -> None:
        """Write the rows in use, class by class, with names and groups, to a safetensors file, whole or not at all.

        Takes memory for a few megabytes of rows at a time, so that what is mapped, and larger than the memory, can be
        written too.

        Raises:
            TypeError: rows of a dtype that has no place there. OSError: what the system says.
        """
        named = {"name": self.name, "names": self.names, "groups": self.groups}
        store.save(path, self.rows, self.order, self.offsets, **named)

    @staticmethod
    def load(path: str | PathLike) -> Examples:
        """What `save` wrote. Its rows are mapped: they are read from the file as they are used, and take no memory that
        could not be given back. What is written to them stays in memory and does not change the file.

        Raises:
            ValueError: a file that is missing, damaged or none of `save`, by name.
        """
        found = object.__new__(Examples)
        found.rows, found.offsets, named = store.load(path)
        found.order, found.mapped = torch.arange(len(found.rows)), True
        found.name, found.names = named["name"], tuple(named["names"])
        found.groups = None if named["groups"] is None else tuple(named["groups"])
        return found

    def __repr__(self) -> str:
        least, most = int(self.counts.min()), int(self.counts.max())
        sizes = f"{least} to {most}" if least < most else f"{least}"
        kind = f"{list(self.input_shape)} {values.dtype_of(self.rows)}"
        return f"Examples({self.name!r}: {len(self)} classes of {sizes} rows {kind})"


def _numbered(labels: Tensor | Sequence[Hashable]) -> tuple[list, Tensor]:
    """The classes in sorted order, and the class of each row, int64 `[R]`."""
    if isinstance(labels, Tensor):
        values.on_device("labels", values.tensor("labels", labels))
        if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"labels must be integers [R], got {labels.dtype} {list(labels.shape)}")
        classes, label = labels.cpu().unique(return_inverse=True)
        return classes.tolist(), label
    if isinstance(labels, (str, bytes)) or not hasattr(labels, "__len__"):
        raise TypeError(f"labels must be a tensor or a sequence, one for each row, got {values.shown(labels)}")
    labels = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    try:
        classes = set(labels)
    except TypeError as error:
        raise TypeError(f"labels must be numbers, text or what else has a hash: {error}") from error
    if any(one != one for one in classes):  # each would be a class of its own
        row = next(i for i, one in enumerate(labels) if one != one)
        raise ValueError(f"labels must say of each row which class it is of, and label {row} is NaN")
    try:
        classes = sorted(classes)
    except TypeError:  # of kinds that have no order between them
        classes = sorted(classes, key=lambda one: (type(one).__name__, str(one)))
    number = {one: i for i, one in enumerate(classes)}
    return classes, torch.tensor([number[one] for one in labels], dtype=torch.int64)
