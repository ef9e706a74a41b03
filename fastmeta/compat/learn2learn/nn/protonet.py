"""The classifier of Prototypical Networks: the nearest class mean."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmeta import functional

EPS = 1e-8


def compute_prototypes(support: Tensor, labels: Tensor) -> Tensor:
    """Means `[N, ...]` of the rows of `support` `[S, ...]` with each of the `N` labels in `labels` `[S]`, any numbers,
    in rising order."""
    classes, index = torch.unique(labels, return_inverse=True)
    if not _served(support) or not len(support):
        return torch.stack([support[labels == label].mean(dim=0) for label in classes])
    rows, index = support.reshape(1, len(support), -1), index.reshape(1, -1).to(support.device)
    return functional.class_prototypes(rows, index, len(classes))[0].view(-1, *support.shape[1:])


def _served(*tensors: Tensor) -> bool:
    """Whether fastmeta's ops take these and do the same: autocast, which they follow, is none of 0.2.0's business."""
    first = tensors[0]
    wide = first.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(first.device.type)
    return wide and all(t.dtype == first.dtype and t.device == first.device for t in tensors)


class PrototypicalClassifier(nn.Module):
    """Logits of query features from the means of support features (Snell et al. 2017).

    Logits `[Q, N]` are minus the distance: the squared Euclidean one, or minus the product of features that were
    divided by their norm plus 1e-8. Column c is the c-th label in rising order; labels may be any numbers.

    Args:
        support: features `[S, D]`; with `labels` `[S]` given to `fit_` at once.
        labels: their labels.
        distance: "euclidean" (default), "cosine", or a callable of prototypes `[N, D]` and queries `[Q, D]` that
            returns distances `[Q, N]`.
        normalize: whether prototypes and queries are divided by their norm; always with "cosine".

    Two of the steps are kernels, differentiable twice: prototypes and squared distances.
    """

    def __init__(self, support=None, labels=None, distance="euclidean", normalize: bool = False):
        super().__init__()
        self.normalize = normalize or distance == "cosine"
        self._compute_prototypes = compute_prototypes
        known = {
            "euclidean": PrototypicalClassifier.euclidean_distance,
            "cosine": PrototypicalClassifier.cosine_distance,
        }
        self.distance = known[distance] if isinstance(distance, str) and distance in known else distance
        self.prototypes = None
        if support is not None and labels is not None:
            self.fit_(support, labels)

    def fit_(self, support: Tensor, labels: Tensor) -> Tensor:
        """Sets and returns the prototypes, in the graph of `support`."""
        prototypes = self._compute_prototypes(support, labels)
        if self.normalize:
            prototypes = PrototypicalClassifier.normalize(prototypes)
        self.prototypes = prototypes
        return prototypes

    @staticmethod
    def cosine_distance(prototypes: Tensor, queries: Tensor) -> Tensor:
        """Minus the products `[Q, N]` of features that are normalised already."""
        return -torch.mm(queries, prototypes.t())

    @staticmethod
    def euclidean_distance(prototypes: Tensor, queries: Tensor) -> Tensor:
        """Squared Euclidean distances `[Q, N]`."""
        if _served(prototypes, queries) and prototypes.dim() == queries.dim() == 2:
            return functional.pairwise_distance(queries.unsqueeze(0), prototypes.unsqueeze(0))[0]
        return (prototypes.unsqueeze(0) - queries.unsqueeze(1)).pow(2).sum(dim=2)

    @staticmethod
    def normalize(x: Tensor, epsilon: float = EPS) -> Tensor:
        """`x / (|x| + epsilon)` by rows."""
        return x / (x.norm(p=2, dim=1, keepdim=True) + epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[Q, N]` of features `[Q, D]`.

        Raises:
            AssertionError: `fit_` was not called.
        """
        assert self.prototypes is not None, "Prototypes not computed, use compute_prototypes(support, labels)"
        if self.normalize:
            x = PrototypicalClassifier.normalize(x)
        return -self.distance(self.prototypes, x)
