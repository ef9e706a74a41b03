"""What a task sampler needs of a data set."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor
from torch.utils.data import Dataset


class FewShotDataset(Dataset):
    """Base of data sets with `get_labels()`: the label of each row, in order."""

    @abstractmethod
    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        raise NotImplementedError("a few-shot dataset needs `__getitem__`")

    @abstractmethod
    def __len__(self) -> int:
        raise NotImplementedError("a few-shot dataset needs `__len__`")

    @abstractmethod
    def get_labels(self) -> list[int]:
        raise NotImplementedError("a few-shot dataset needs `get_labels`")
