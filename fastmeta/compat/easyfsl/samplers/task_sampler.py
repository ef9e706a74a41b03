"""Batches that are few-shot tasks, for `torch.utils.data.DataLoader(batch_sampler=, collate_fn=)`."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from fastmeta.compat.easyfsl.datasets.few_shot_dataset import FewShotDataset

GENERIC_TYPING_ERROR_MESSAGE = "Rows must be tuples of a tensor and an int, or a tensor without dimensions."
_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


class TaskSampler(Sampler):
    """`n_tasks` tasks of `n_way` classes, with `n_shot` support and `n_query` query rows each, drawn by `random`.

    Args:
        dataset: has `get_labels()`, the label of each row.

    Raises:
        ValueError: fewer classes than `n_way`, or a class with fewer rows than `n_shot + n_query`.
    """

    def __init__(self, dataset: FewShotDataset, n_way: int, n_shot: int, n_query: int, n_tasks: int):
        super().__init__()
        self.n_way = n_way
        self.n_shot = n_shot
        self.n_query = n_query
        self.n_tasks = n_tasks
        self.items_per_label: dict[int, list[int]] = {}
        for item, label in enumerate(dataset.get_labels()):
            self.items_per_label.setdefault(label, []).append(item)
        self._check_dataset_size_fits_sampler_parameters()

    def __len__(self) -> int:
        return self.n_tasks

    def __iter__(self) -> Iterator[list[int]]:
        """Rows class by class, of each the support rows first."""
        labels, size = sorted(self.items_per_label), self.n_shot + self.n_query
        for _ in range(self.n_tasks):
            chosen = random.sample(labels, self.n_way)
            yield [item for label in chosen for item in random.sample(self.items_per_label[label], size)]

    def episodic_collate_fn(
        self, input_data: list[tuple[Tensor, Tensor | int]]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
        """One task of the rows that `__iter__` names.

        Returns:
            Support images `[n_way * n_shot, ...]` and labels, query images `[n_way * n_query, ...]` and labels, and the
            classes' own labels: a row labelled `c` is of the class at place `c`.

        Raises:
            TypeError: an image that is no tensor, or a label that is no integer.
            ValueError: a label with dimensions.
        """
        rows = self._cast_input_data_to_tensor_int_tuple(input_data)
        true_class_ids = list({label for _, label in rows})
        place = {label: number for number, label in enumerate(true_class_ids)}
        by_class = (self.n_way, self.n_shot + self.n_query)
        images = torch.stack([image for image, _ in rows]).unflatten(0, by_class)
        labels = torch.tensor([place[label] for _, label in rows]).unflatten(0, by_class)
        return (
            images[:, : self.n_shot].flatten(0, 1),
            labels[:, : self.n_shot].flatten(),
            images[:, self.n_shot :].flatten(0, 1),
            labels[:, self.n_shot :].flatten(),
            true_class_ids,
        )

    @staticmethod
    def _cast_input_data_to_tensor_int_tuple(input_data: list[tuple[Tensor, Tensor | int]]) -> list[tuple[Tensor, int]]:
        for image, label in input_data:
            if not isinstance(image, Tensor):
                raise TypeError(f"an image is of type {type(image)}. {GENERIC_TYPING_ERROR_MESSAGE}")
            if isinstance(label, int):
                continue
            if not isinstance(label, Tensor):
                raise TypeError(f"a label is of type {type(label)}. {GENERIC_TYPING_ERROR_MESSAGE}")
            if label.dtype not in _INTEGERS:
                raise TypeError(f"a label has dtype {label.dtype}. {GENERIC_TYPING_ERROR_MESSAGE}")
            if label.dim():
                raise ValueError(f"a label has shape {list(label.shape)}. {GENERIC_TYPING_ERROR_MESSAGE}")
        return [(image, int(label)) for image, label in input_data]

    def _check_dataset_size_fits_sampler_parameters(self) -> None:
        if self.n_way > len(self.items_per_label):
            raise ValueError(f"the dataset has {len(self.items_per_label)} labels, fewer than n_way, {self.n_way}")
        size = self.n_shot + self.n_query
        label, items = min(self.items_per_label.items(), key=lambda pair: len(pair[1]))
        if size > len(items):
            raise ValueError(f"label {label} has {len(items)} rows, fewer than n_shot + n_query, {size}")
