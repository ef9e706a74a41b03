"""Relation networks (Sung et al. 2018, "Learning to Compare: Relation Network for Few-Shot Learning")."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmeta.compat.easyfsl.methods.few_shot_classifier import FewShotClassifier
from fastmeta.compat.easyfsl.methods.utils import compute_prototypes
from fastmeta.compat.easyfsl.modules.predesigned_modules import default_relation_module


class RelationNetworks(FewShotClassifier):
    """Scores of pairs of feature maps, a class's mean and a query's, by a network.

    Args:
        feature_dimension: channels K of the backbone's maps `[N, K, H, W]`.
        relation_module: `[Q C, 2 K, H, W]`, the prototype's channels first, -> `[Q C, 1]`; default the paper's.
    """

    def __init__(self, *args, feature_dimension: int, relation_module: nn.Module | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.feature_dimension = feature_dimension
        self.relation_module = relation_module or default_relation_module(feature_dimension)

    def process_support_set(self, support_images: Tensor, support_labels: Tensor) -> None:
        support_features = self.compute_features(support_images)
        self._validate_features_shape(support_features)
        self.prototypes = compute_prototypes(support_features, support_labels)

    def forward(self, query_images: Tensor) -> Tensor:
        query_features = self.compute_features(query_images)
        self._validate_features_shape(query_features)
        queries, classes = len(query_features), len(self.prototypes)
        pairs = torch.cat(
            (
                self.prototypes.unsqueeze(0).expand(queries, -1, -1, -1, -1),
                query_features.unsqueeze(1).expand(-1, classes, -1, -1, -1),
            ),
            dim=2,
        )
        return self.softmax_if_specified(self.relation_module(pairs.flatten(0, 1)).view(-1, classes))

    def _validate_features_shape(self, features: Tensor) -> None:
        if features.dim() != 4:
            raise ValueError(f"the backbone must give one map for each image, [N, K, H, W], got {list(features.shape)}")
        if features.shape[1] != self.feature_dimension:
            raise ValueError(f"features must have {self.feature_dimension} channels, got {features.shape[1]}")

    @staticmethod
    def is_transductive() -> bool:
        return False
