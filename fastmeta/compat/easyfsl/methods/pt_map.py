"""PT-MAP (Hu, Gripon, Pateux 2020, "Leveraging the Feature Distribution in Transfer-based Few-Shot Learning")."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fastmeta.compat.easyfsl.methods.few_shot_classifier import FewShotClassifier
from fastmeta.compat.easyfsl.methods.utils import distances, power_transform

MAXIMUM_SINKHORN_ITERATIONS = 1000


class PTMAP(FewShotClassifier):
    """Queries are transported to prototypes, which move to what they are given. Transductive; `forward` gives the plan.

    Args:
        fine_tuning_steps: moves of the prototypes (default 10).
        fine_tuning_lr: how far they go (default 0.2).
        lambda_regularization: of the transport (default 10).
        power_factor: of `power_transform`, which features go through (default 0.5).
    """

    def __init__(
        self,
        *args,
        fine_tuning_steps: int = 10,
        fine_tuning_lr: float = 0.2,
        lambda_regularization: float = 10.0,
        power_factor: float = 0.5,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.fine_tuning_steps = fine_tuning_steps
        self.fine_tuning_lr = fine_tuning_lr
        self.lambda_regularization = lambda_regularization
        self.power_factor = power_factor

    def forward(self, query_images: Tensor) -> Tensor:
        query_features = self.compute_features(query_images)
        features = torch.cat([self.support_features, query_features])
        support_assignments = one_hot(self.support_labels, len(self.prototypes))
        for _ in range(self.fine_tuning_steps):
            assignments = torch.cat([support_assignments, self.compute_soft_assignments(query_features)])
            self.update_prototypes(features, assignments)
        return self.compute_soft_assignments(query_features)

    def compute_features(self, images: Tensor) -> Tensor:
        return power_transform(super().compute_features(images), self.power_factor)

    def compute_soft_assignments(self, query_features: Tensor) -> Tensor:
        """The transport plan `[Q, C]` for squared distances (equation 3)."""
        return self.compute_optimal_transport(distances(query_features, self.prototypes) ** 2, epsilon=1e-6)

    def compute_optimal_transport(self, cost_matrix: Tensor, epsilon: float = 1e-6) -> Tensor:
        """Sinkhorn's algorithm on costs `[Q, C]`: rows sum to 1, columns to `Q // C`; ends where no row's sum changes
        by `epsilon`, or after 1000 rounds."""
        per_class = cost_matrix.shape[0] // cost_matrix.shape[1]
        plan = torch.exp(-self.lambda_regularization * cost_matrix)
        plan = plan / plan.sum()
        for _ in range(MAXIMUM_SINKHORN_ITERATIONS):
            row_sums = plan.sum(1)
            plan = plan * (1 / (row_sums + 1e-10)).unsqueeze(1)
            plan = plan * (per_class / (plan.sum(0) + 1e-10)).unsqueeze(0)
            if (row_sums - plan.sum(1)).abs().max() < epsilon:
                break
        return plan

    def update_prototypes(self, all_features: Tensor, all_assignments: Tensor) -> None:
        """A part of the way to the means of `[S + Q, D]` weighted with `[S + Q, C]` (equation 6)."""
        means = (all_assignments.T @ all_features) / all_assignments.sum(0).unsqueeze(1)
        self.prototypes = self.prototypes + self.fine_tuning_lr * (means - self.prototypes)

    @staticmethod
    def is_transductive() -> bool:
        return True
