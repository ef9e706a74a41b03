"""What a task is before it is loaded."""

from __future__ import annotations


class DataDescription:
    """A sample to come: its `index` in the data set, and the `transforms` that the index passes through."""

    __slots__ = ("index", "transforms")

    def __init__(self, index: int):
        self.index = index
        self.transforms = []

    def copy(self) -> DataDescription:
        other = DataDescription(self.index)
        other.transforms = self.transforms.copy()
        return other
