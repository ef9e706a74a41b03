"""How hard an episode is."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmeta.compat.torchmeta.utils.prototype import get_prototypes

__all__ = ["hardness_metric"]

_SIZE = 224  # of the images that the backbone was trained on


def hardness_metric(
    batch: Mapping[str, tuple[Tensor, Tensor]], num_classes: int, backbone: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Mean log-odds against the right class of a task's queries under a pretrained network (Dhillon et al. 2019, "A
    Baseline for Few-Shot Image Classification"), `[T]`.

    Args:
        batch: images `[T, S, 3, H, W]` and classes `[T, S]` under "train" or "support", and likewise `[T, Q, ...]`
            under "test" or "query".
        num_classes: of a task.
        backbone: images `[B, 3, 224, 224]` -> logits `[B, K]`. None (default) for torchvision's ResNet-152, trained on
            ImageNet, which torchmeta always takes; needs torchvision.

    Raises:
        ValueError: no such sets, or images that are not RGB.
        ImportError: no torchvision.
    """
    (images, targets), (test_images, test_targets) = (
        batch[_first_key(batch, *names)] for names in (("train", "support"), ("test", "query"))
    )
    if images.shape[2] != 3:
        raise ValueError(f"images must be RGB, [T, S, 3, H, W], got {tuple(images.shape)}")
    with torch.no_grad():
        if backbone is None:
            backbone = _resnet().to(images.device)
        logits, test_logits = (
            backbone(_padded(x).flatten(0, 1)).unflatten(0, x.shape[:2]) for x in (images, test_images)
        )
        weights = F.normalize(get_prototypes(logits.relu(), targets, num_classes), dim=2)
        similarities = torch.bmm(weights, F.normalize(test_logits, dim=2).transpose(1, 2))
        log_probas = -F.cross_entropy(similarities, test_targets, reduction="none")
        return (torch.log1p(-log_probas.exp()) - log_probas).mean(1)


def _first_key(batch: Mapping, *names: str) -> str:
    for name in names:
        if name in batch:
            return name
    raise ValueError(f"the batch has neither {' nor '.join(map(repr, names))}, only {sorted(batch)}")


def _padded(images: Tensor) -> Tensor:
    height, width = (_SIZE - size for size in images.shape[-2:])
    return F.pad(images, (width // 2, width - width // 2, height // 2, height - height // 2))


def _resnet() -> torch.nn.Module:
    try:
        from torchvision.models import ResNet152_Weights, resnet152
    except ImportError as error:
        raise ImportError("hardness_metric needs torchvision for its network, or a `backbone`") from error
    return resnet152(weights=ResNet152_Weights.IMAGENET1K_V1).eval()
