"""SimpleShot (Wang et al. 2019, "SimpleShot: Revisiting Nearest-Neighbor Classification for Few-Shot Learning")."""

from __future__ import annotations

from torch import Tensor

from fastmeta.compat.easyfsl.methods.few_shot_classifier import FewShotClassifier


class SimpleShot(FewShotClassifier):
    """Scores are the cosine similarities to the classes' means."""

    def forward(self, query_images: Tensor) -> Tensor:
        query_features = self.compute_features(query_images)
        self._raise_error_if_features_are_multi_dimensional(query_features)
        return self.softmax_if_specified(self.cosine_distance_to_prototypes(query_features))

    @staticmethod
    def is_transductive() -> bool:
        return False
