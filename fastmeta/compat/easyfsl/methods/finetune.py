"""Baseline with fine-tuning (Chen et al. 2019, "A Closer Look at Few-shot Classification")."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastmeta.compat.easyfsl.methods.few_shot_classifier import FewShotClassifier


class Finetune(FewShotClassifier):
    """Prototypes trained by Adam on the support set; scores are the cosine similarities to them. The backbone is
    frozen, and scores have no gradient. Each call goes on from the prototypes that it finds.

    Args:
        fine_tuning_steps: steps of Adam (default 200).
        fine_tuning_lr: its rate (default 1e-4).
        temperature: factor of the scores in the cross-entropy and the softmax (default 1).
    """

    def __init__(
        self,
        *args,
        fine_tuning_steps: int = 200,
        fine_tuning_lr: float = 1e-4,
        temperature: float = 1.0,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.backbone.requires_grad_(False)
        self.fine_tuning_steps = fine_tuning_steps
        self.fine_tuning_lr = fine_tuning_lr
        self.temperature = temperature

    def forward(self, query_images: Tensor) -> Tensor:
        query_features = self.compute_features(query_images)
        self._train_prototypes(
            lambda: cross_entropy(
                self.temperature * self.cosine_distance_to_prototypes(self.support_features), self.support_labels
            )
        )
        return self._scores(self.cosine_distance_to_prototypes(query_features))

    def _train_prototypes(self, loss_of_prototypes: Callable[[], Tensor]) -> None:
        with torch.enable_grad():
            self.prototypes.requires_grad_()
            optimizer = torch.optim.Adam([self.prototypes], lr=self.fine_tuning_lr)
            for _ in range(self.fine_tuning_steps):
                loss = loss_of_prototypes()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def _scores(self, scores: Tensor) -> Tensor:
        return self.softmax_if_specified(scores, temperature=self.temperature).detach()

    @staticmethod
    def is_transductive() -> bool:
        return False
