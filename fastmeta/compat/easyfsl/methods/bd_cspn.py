"""BD-CSPN (Liu, Song, Qin 2020, "Prototype Rectification for Few-Shot Learning")."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import one_hot

from fastmeta.compat.easyfsl.methods.few_shot_classifier import FewShotClassifier


class BDCSPN(FewShotClassifier):
    """Prototypes that queries correct; scores are the cosine similarities to them. Transductive."""

    def rectify_prototypes(self, query_features: Tensor) -> None:
        """Moves the queries' mean to that of the support set, gives each query its nearest class, and takes as
        prototypes the means weighted with the exponential of the similarity to the old ones."""
        classes = len(self.support_labels.unique())
        shifted = query_features + (self.support_features.mean(0, keepdim=True) - query_features.mean(0, keepdim=True))
        support_weights = self.cosine_distance_to_prototypes(self.support_features).exp()
        query_weights = self.cosine_distance_to_prototypes(shifted).exp()
        support_weights = support_weights * one_hot(self.support_labels, classes)
        query_weights = query_weights * one_hot(query_weights.argmax(-1), classes)
        total = support_weights.sum(0) + query_weights.sum(0)
        sums = support_weights.T @ self.support_features + query_weights.T @ shifted
        self.prototypes = sums / total.unsqueeze(1)

    def forward(self, query_images: Tensor) -> Tensor:
        query_features = self.compute_features(query_images)
        self.rectify_prototypes(query_features=query_features)
        return self.softmax_if_specified(self.cosine_distance_to_prototypes(query_features))

    @staticmethod
    def is_transductive() -> bool:
        return True
