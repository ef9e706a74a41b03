"""LaplacianShot (Ziko et al. 2020, "Laplacian Regularized Few-Shot Learning")."""

from __future__ import annotations

from torch import Tensor

from fastmeta.compat.easyfsl.methods.bd_cspn import BDCSPN
from fastmeta.compat.easyfsl.methods.utils import distances, k_nearest_neighbours


class LaplacianShot(BDCSPN):
    """Soft assignments to the prototypes of `BDCSPN` in which near queries agree. Transductive; `forward` gives
    probabilities.

    Args:
        inference_steps: the most updates of the bound (default 20).
        knn: neighbours, the query itself counted (default 3).
        lambda_regularization: weight of the agreement (default 0.7).
    """

    def __init__(
        self, *args, inference_steps: int = 20, knn: int = 3, lambda_regularization: float = 0.7, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.knn = knn
        self.inference_steps = inference_steps
        self.lambda_regularization = lambda_regularization

    def forward(self, query_images: Tensor) -> Tensor:
        query_features = self.compute_features(query_images)
        self.rectify_prototypes(query_features=query_features)
        return self.bound_updates(
            initial_scores=distances(query_features, self.prototypes) ** 2,
            kernel=self.compute_pairwise_affinities(query_features),
        )

    def compute_pairwise_affinities(self, features: Tensor) -> Tensor:
        """`[N, N]`, 1 where column j is among the nearest neighbours of row i, else 0."""
        neighbours = k_nearest_neighbours(features, self.knn)
        return features.new_zeros(len(features), len(features)).scatter_(1, neighbours, 1.0)

    def compute_upper_bound(self, soft_assignments: Tensor, initial_scores: Tensor, kernel: Tensor) -> float:
        """The objective that the updates lower (equation 7)."""
        agreement = self.lambda_regularization * kernel.matmul(soft_assignments)
        terms = (soft_assignments + 1e-12).log() + initial_scores - agreement
        return (soft_assignments * terms).sum().item()

    def bound_updates(self, initial_scores: Tensor, kernel: Tensor) -> Tensor:
        """Algorithm 1: soft assignments `[Q, C]` of squared distances `[Q, C]`, until the bound is still."""
        old_bound = float("inf")
        soft_assignments = (-initial_scores).softmax(dim=1)
        for step in range(self.inference_steps):
            agreement = self.lambda_regularization * kernel.matmul(soft_assignments)
            soft_assignments = (agreement - initial_scores).softmax(dim=1)
            bound = self.compute_upper_bound(soft_assignments, initial_scores, kernel)
            if step > 1 and abs(bound - old_bound) <= 1e-6 * abs(old_bound):
                break
            old_bound = bound
        return soft_assignments
