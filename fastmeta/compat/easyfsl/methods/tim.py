"""TIM (Boudiaf et al. 2020, "Transductive Information Maximization for Few-Shot Learning")."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastmeta.compat.easyfsl.methods.finetune import Finetune
from fastmeta.compat.easyfsl.methods.utils import entropy


class TIM(Finetune):
    """`Finetune` with the mutual information of queries and their predictions in the loss. Transductive.

    Args:
        fine_tuning_steps: steps of Adam (default 50).
        fine_tuning_lr: its rate (default 1e-4).
        cross_entropy_weight: of the support set's loss (default 1).
        marginal_entropy_weight: of the entropy of the mean prediction, which is to be high (default 1).
        conditional_entropy_weight: of the mean entropy of the predictions, which is to be low (default 0.1).
        temperature: factor of the scores (default 10).
    """

    def __init__(
        self,
        *args,
        fine_tuning_steps: int = 50,
        fine_tuning_lr: float = 1e-4,
        cross_entropy_weight: float = 1.0,
        marginal_entropy_weight: float = 1.0,
        conditional_entropy_weight: float = 0.1,
        temperature: float = 10.0,
        **kwargs,
    ):
        super().__init__(
            *args,
            fine_tuning_steps=fine_tuning_steps,
            fine_tuning_lr=fine_tuning_lr,
            temperature=temperature,
            **kwargs,
        )
        self.cross_entropy_weight = cross_entropy_weight
        self.marginal_entropy_weight = marginal_entropy_weight
        self.conditional_entropy_weight = conditional_entropy_weight

    def forward(self, query_images: Tensor) -> Tensor:
        query_features = self.compute_features(query_images)

        def loss():
            support_scores = self.temperature * self.cosine_distance_to_prototypes(self.support_features)
            query_scores = self.temperature * self.cosine_distance_to_prototypes(query_features)
            marginal = query_scores.softmax(1).mean(0)
            marginal_entropy = -(marginal * torch.log(marginal)).sum()
            return (
                self.cross_entropy_weight * cross_entropy(support_scores, self.support_labels)
                - self.marginal_entropy_weight * marginal_entropy
                + self.conditional_entropy_weight * entropy(query_scores)
            )

        self._train_prototypes(loss)
        return self._scores(self.cosine_distance_to_prototypes(query_features))

    @staticmethod
    def is_transductive() -> bool:
        return True
