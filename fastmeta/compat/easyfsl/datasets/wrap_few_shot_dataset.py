"""Any data set as a few-shot data set."""

from __future__ import annotations

from torch import Tensor
from torch.utils.data import Dataset

from fastmeta.compat.easyfsl._optional import Progress
from fastmeta.compat.easyfsl.datasets.few_shot_dataset import FewShotDataset


class WrapFewShotDataset(FewShotDataset):
    """A data set whose items are tuples, all of which are read once for their labels.

    Args:
        dataset: to wrap.
        image_position_in_get_item_output, label_position_in_get_item_output: places in an item, 0 and 1 by default.

    Raises:
        ValueError: places that are equal, below 0, or not in an item.
    """

    def __init__(
        self,
        dataset: Dataset,
        image_position_in_get_item_output: int = 0,
        label_position_in_get_item_output: int = 1,
    ):
        image, label = image_position_in_get_item_output, label_position_in_get_item_output
        if image == label:
            raise ValueError(f"image and label cannot both be at place {image} of an item")
        if min(image, label) < 0:
            raise ValueError(f"places in an item must be 0 or more, got {image} and {label}")
        if max(image, label) >= (length := len(dataset[0])):
            raise ValueError(f"an item has {length} places, so not {image} and {label}")
        self.source_dataset = dataset
        self.labels = [item[label] for item in Progress(dataset, desc="Reading labels")]
        self.image_position_in_get_item_output = image
        self.label_position_in_get_item_output = label

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        values = self.source_dataset[item]
        return values[self.image_position_in_get_item_output], values[self.label_position_in_get_item_output]

    def __len__(self) -> int:
        return len(self.labels)

    def get_labels(self) -> list[int]:
        return self.labels
