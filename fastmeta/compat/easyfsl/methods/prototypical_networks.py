"""Prototypical networks (Snell et al. 2017)."""

from __future__ import annotations

from torch import Tensor

from fastmeta.compat.easyfsl.methods.few_shot_classifier import FewShotClassifier


class PrototypicalNetworks(FewShotClassifier):
    """Scores are minus the Euclidean distances to the classes' means; not their squares, as in the paper."""

    def forward(self, query_images: Tensor) -> Tensor:
        query_features = self.compute_features(query_images)
        self._raise_error_if_features_are_multi_dimensional(query_features)
        return self.softmax_if_specified(self.l2_distance_to_prototypes(query_features))

    @staticmethod
    def is_transductive() -> bool:
        return False
