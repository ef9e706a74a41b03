"""Transductive fine-tuning (Dhillon et al. 2020, "A Baseline for Few-Shot Image Classification")."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from fastmeta.compat.easyfsl.methods.finetune import Finetune
from fastmeta.compat.easyfsl.methods.utils import entropy


class TransductiveFinetuning(Finetune):
    """`Finetune` on minus the Euclidean distance, with the entropy of the queries' predictions in the loss. Only the
    prototypes are trained, where the paper trains the network. By default 25 steps at a rate of 5e-5."""

    def __init__(
        self,
        *args,
        fine_tuning_steps: int = 25,
        fine_tuning_lr: float = 5e-5,
        temperature: float = 1.0,
        **kwargs,
    ):
        super().__init__(
            *args,
            fine_tuning_steps=fine_tuning_steps,
            fine_tuning_lr=fine_tuning_lr,
            temperature=temperature,
            **kwargs,
        )

    def forward(self, query_images: Tensor) -> Tensor:
        query_features = self.compute_features(query_images)

        def loss():
            support_scores = self.temperature * self.l2_distance_to_prototypes(self.support_features)
            query_scores = self.temperature * self.l2_distance_to_prototypes(query_features)
            return cross_entropy(support_scores, self.support_labels) + entropy(query_scores)

        self._train_prototypes(loss)
        return self._scores(self.l2_distance_to_prototypes(query_features))

    @staticmethod
    def is_transductive() -> bool:
        return True
