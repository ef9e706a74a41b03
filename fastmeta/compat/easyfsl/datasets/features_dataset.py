"""Embeddings as a data set."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastmeta.compat.easyfsl.datasets.few_shot_dataset import FewShotDataset

if TYPE_CHECKING:
    from pandas import DataFrame


class FeaturesDataset(FewShotDataset):
    """Embeddings `[R, ...]`, the label of each, and the name of each label."""

    def __init__(self, labels: list[int], embeddings: Tensor, class_names: list[str]):
        self.labels = labels
        self.embeddings = embeddings
        self.class_names = class_names

    @classmethod
    def from_dataframe(cls, source_dataframe: DataFrame) -> FeaturesDataset:
        """Of a frame with the columns `embedding` and `class_name`; labels count the names as they come.

        Raises:
            ValueError: a column is missing.
        """
        columns = source_dataframe.columns
        if not {"embedding", "class_name"}.issubset(columns):
            raise ValueError(f"the frame must have the columns embedding and class_name, it has {list(columns)}")
        class_names = list(source_dataframe.class_name.unique())
        place = {name: label for label, name in enumerate(class_names)}
        labels = [place[name] for name in source_dataframe.class_name]
        if not labels:
            warnings.warn("the frame is empty, and so is the FeaturesDataset", UserWarning, stacklevel=2)
            return cls(labels, torch.empty(0), class_names)
        return cls(labels, torch.from_numpy(np.stack(list(source_dataframe.embedding))), class_names)

    @classmethod
    def from_dict(cls, source_dict: Mapping[str, np.ndarray | Tensor]) -> FeaturesDataset:
        """Of embeddings `[rows of the class, ...]` by the class's name; labels count the names.

        Raises:
            ValueError: a value that is neither an array nor a tensor.
        """
        labels, embeddings = [], []
        for label, (name, rows) in enumerate(source_dict.items()):
            if not isinstance(rows, (np.ndarray, Tensor)):
                raise ValueError(f"embeddings must be NumPy arrays or tensors, those of class {name} are {type(rows)}")
            embeddings.append(torch.as_tensor(rows))
            labels += [label] * len(rows)
        return cls(labels, torch.cat(embeddings), list(source_dict))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.embeddings[index], self.labels[index]

    def __len__(self) -> int:
        return len(self.labels)

    def get_labels(self) -> list[int]:
        return self.labels

    def number_of_classes(self) -> int:
        return len(self.class_names)
