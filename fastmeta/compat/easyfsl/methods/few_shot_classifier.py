"""What all few-shot classifiers share."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from fastmeta.compat.easyfsl.methods.utils import compute_prototypes, distances


class FewShotClassifier(nn.Module):
    """Base of the few-shot classifiers. A subclass has `forward`, and `is_transductive`.

    Args:
        backbone: features of images, by default `torch.nn.Identity()`.
        use_softmax: give probabilities in place of scores (default False).
        feature_centering: `[D]`, taken off all features; default 0.
        feature_normalization: the norm, `p` of `torch.nn.functional.normalize`, by which centred features are divided;
            default None, none.

    Attributes:
        prototypes `[C, D]`, support_features `[S, D]`, support_labels `[S]`: plain tensors, of the last support set.
    """

    def __init__(
        self,
        backbone: nn.Module | None = None,
        use_softmax: bool = False,
        feature_centering: Tensor | None = None,
        feature_normalization: float | None = None,
    ):
        super().__init__()
        self.backbone = nn.Identity() if backbone is None else backbone
        self.use_softmax = use_softmax
        self.prototypes = torch.tensor(())
        self.support_features = torch.tensor(())
        self.support_labels = torch.tensor(())
        self.feature_centering = torch.tensor(0) if feature_centering is None else feature_centering
        self.feature_normalization = feature_normalization

    @abstractmethod
    def forward(self, query_images: Tensor) -> Tensor:
        """Scores `[Q, C]` of query images `[Q, ...]`."""
        raise NotImplementedError(f"{type(self).__name__} has no `forward`")

    def process_support_set(self, support_images: Tensor, support_labels: Tensor) -> None:
        """Remembers a support set, images `[S, ...]` and labels `[S]`, for the calls that follow."""
        self.compute_prototypes_and_store_support_set(support_images, support_labels)

    @staticmethod
    def is_transductive() -> bool:
        """Whether the scores of a query depend on the other queries."""
        raise NotImplementedError("a few-shot classifier says in `is_transductive` whether it is")

    def compute_features(self, images: Tensor) -> Tensor:
        """Features of images, centred and normalised."""
        features = self.backbone(images) - self.feature_centering
        if self.feature_normalization is None:
            return features
        return nn.functional.normalize(features, p=self.feature_normalization, dim=1)

    def softmax_if_specified(self, output: Tensor, temperature: float = 1.0) -> Tensor:
        """Probabilities of `temperature * output`, or `output` as it is."""
        return (temperature * output).softmax(-1) if self.use_softmax else output

    def l2_distance_to_prototypes(self, samples: Tensor) -> Tensor:
        """Minus the Euclidean distance, not squared, `[N, D]` -> `[N, C]`."""
        return -distances(samples, self.prototypes)

    def cosine_distance_to_prototypes(self, samples: Tensor) -> Tensor:
        """The cosine similarity, `[N, D]` -> `[N, C]`; each norm is 1e-12 at least."""
        normalize = nn.functional.normalize
        return normalize(samples, dim=1) @ normalize(self.prototypes, dim=1).T

    def compute_prototypes_and_store_support_set(self, support_images: Tensor, support_labels: Tensor) -> None:
        self.support_labels = support_labels
        self.support_features = self.compute_features(support_images)
        self._raise_error_if_features_are_multi_dimensional(self.support_features)
        self.prototypes = compute_prototypes(self.support_features, support_labels)

    @staticmethod
    def _raise_error_if_features_are_multi_dimensional(features: Tensor) -> None:
        if features.dim() != 2:
            raise ValueError(f"the backbone must give one vector for each image, [N, D], got {list(features.shape)}")
