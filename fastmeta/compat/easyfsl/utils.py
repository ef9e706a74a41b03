"""Evaluation, embeddings of a data set, and small helps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastmeta.compat.easyfsl._optional import Progress, need
from fastmeta.compat.easyfsl.methods import FewShotClassifier
from fastmeta.compat.easyfsl.methods.utils import compute_prototypes

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = [
    "compute_average_features_from_images",
    "compute_prototypes",
    "evaluate",
    "evaluate_on_one_task",
    "plot_images",
    "predict_embeddings",
    "sliding_average",
]


def plot_images(images: Tensor, title: str, images_per_row: int) -> None:
    """Draws images `[B, C, H, W]` in a grid on a new figure of matplotlib. Needs torchvision."""
    from matplotlib import pyplot

    grid = need("torchvision.utils", "plot_images").make_grid(images, nrow=images_per_row)
    pyplot.figure()
    pyplot.title(title)
    pyplot.imshow(grid.permute(1, 2, 0))


def sliding_average(value_list: Sequence[float], window: int) -> float:
    """Mean of the last `window` values, or of all where it is 0 or there are not as many.

    Raises:
        ValueError: no values.
    """
    if len(value_list) == 0:
        raise ValueError("an empty list has no average")
    return np.asarray(value_list[-window:]).mean()


def _embed(dataloader: DataLoader, model: nn.Module, device: torch.device | str | None) -> tuple[Tensor, list]:
    """Embeddings of all images on the CPU, and their class names."""
    embeddings, names = [], []
    with torch.no_grad():
        for images, class_names in Progress(dataloader, unit="batch", desc="Predicting embeddings"):
            images = images if device is None else images.to(device)
            embeddings.append(model(images).detach().cpu())
            names += class_names.tolist() if isinstance(class_names, Tensor) else class_names
    return torch.cat(embeddings), names


def predict_embeddings(
    dataloader: DataLoader, model: nn.Module, device: torch.device | str | None = None
) -> DataFrame:
    """A frame with the columns `embedding`, tensors on the CPU, and `class_name`. Needs pandas.

    Args:
        dataloader: of `(images, class names)`.
        model: embeds images, in the mode in which it is; no gradient is kept.
        device: where images are put, by default nowhere.
    """
    pandas = need("pandas", "predict_embeddings")
    embeddings, names = _embed(dataloader, model, device)
    return pandas.DataFrame({"embedding": list(embeddings), "class_name": names})


def evaluate_on_one_task(
    model: FewShotClassifier,
    support_images: Tensor,
    support_labels: Tensor,
    query_images: Tensor,
    query_labels: Tensor,
) -> tuple[int, int]:
    """How many queries the model gets right, and how many there are."""
    model.process_support_set(support_images, support_labels)
    predictions = model(query_images).detach()
    return int((predictions.argmax(1) == query_labels).sum()), len(query_labels)


def evaluate(
    model: FewShotClassifier,
    data_loader: DataLoader,
    device: str = "cuda",
    use_tqdm: bool = True,
    tqdm_prefix: str | None = None,
) -> float:
    """The part of all queries of all tasks that the model, in eval mode, gets right.

    Args:
        data_loader: of tasks as `samplers.TaskSampler.episodic_collate_fn` makes them.
        device: where tasks are put (default "cuda"), and the model is.
        use_tqdm: show a bar, where tqdm is installed.
        tqdm_prefix: in front of it.
    """
    right = total = 0
    model.eval()
    with torch.no_grad():
        tasks = Progress(data_loader, use_tqdm, total=len(data_loader), desc=tqdm_prefix)
        for *task, _ in tasks:
            right_here, queries = evaluate_on_one_task(model, *(part.to(device) for part in task))
            right += right_here
            total += queries
            tasks.tell(accuracy=right / total)
    return right / total


def compute_average_features_from_images(
    dataloader: DataLoader, model: nn.Module, device: torch.device | str | None = None
) -> Tensor:
    """Mean embedding of all images of a loader of `(images, class names)`, on `device` or by default the CPU."""
    average = _embed(dataloader, model, device)[0].mean(dim=0)
    return average if device is None else average.to(device)
