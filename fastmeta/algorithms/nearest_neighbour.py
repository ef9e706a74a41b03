"""Nearest neighbour on frozen embeddings: what few-shot learning costs nothing to compare with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta import functional, values
from fastmeta.dispatch.backends import METRICS
from fastmeta.functional import checks

from ._embedding import EmbeddingLearner
from .output import MetaOutput

RULES = ("mean", "nearest")
CENTRES = ("none", "support")


class Neighbours(NamedTuple):
    """What `NearestNeighbour.adapt` returns: class means `[T, N, D]` or examples `[T, S, D]` to be near to; their
    labels `[T, S]` (None for means); N; and the mean subtracted, `[T, 1, D]` or `[D]` (None without centring)."""

    embeddings: Tensor
    labels: Tensor | None
    num_classes: int
    centre: Tensor | None


class NearestNeighbour(EmbeddingLearner):
    """Nearest class mean or nearest example on an encoder that is not trained (Wang et al. 2019, "SimpleShot:
    Revisiting Nearest-Neighbor Classification for Few-Shot Learning", section 2).

    `centre` and `normalise` are the paper's: none is its UN, `normalise=True` its L2N, and both its CL2N. With
    `encoder=nn.Flatten()` it is nearest neighbour on pixels, the baseline that every method has to beat.

    Args:
        encoder: any module from examples `[B, ...]` to embeddings `[B, D]`. It runs in eval mode and without gradients,
            and `train()` does not reach it.
        rule: `"mean"` (nearest class mean) or `"nearest"` (1-NN, the class of the nearest support example). The same
            with one shot.
        centre: what is subtracted first: `"none"`, `"support"` (the mean of the task's support embeddings), or a tensor
            `[D]`, such as the mean embedding of the training images, which is the paper's.
        normalise: divide by the Euclidean norm, after centring.
        metric: as in `fastmeta.functional.pairwise_distance`; the paper's is `"sqeuclidean"`.
        ways: the most classes that a task may have, None for any number; see `EmbeddingLearner`.

    `predict` gives minus the distance to the class. The loss is the cross entropy of that and has no gradient.
    Departure: centring by the support mean, for where there are no training images.

    Raises:
        ValueError: an unknown rule, centre or metric, an encoder that does not return `[B, D]`, labels that do not fit.
        TypeError: labels that are not int64.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        rule: str = "mean",
        centre: str | Tensor = "none",
        normalise: bool = False,
        metric: str = "sqeuclidean",
        ways: int | None = None,
    ):
        super().__init__(encoder, ways)
        values.choice("rule", rule, RULES)
        values.choice("metric", metric, METRICS)
        if isinstance(centre, Tensor):
            checks.tensor("centre", centre, "[D]")
        else:
            values.choice("centre", centre, CENTRES)
        self.rule, self.normalise, self.metric = rule, values.flag("normalise", normalise), metric
        self.centre = "given" if isinstance(centre, Tensor) else centre
        self.register_buffer("mean", centre.detach().clone() if isinstance(centre, Tensor) else None)
        self.encoder.eval()

    def train(self, mode: bool = True) -> NearestNeighbour:
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def adapt(self, support_x: Tensor, support_y: Tensor, support_mask: Tensor | None = None) -> Neighbours:
        """Class means or examples of support sets `[T, S, ...]` with labels int64 `[T, S]`; any labels and masks as in
        `ProtoNet.adapt`."""
        return super().adapt(support_x, support_y, support_mask)

    @torch.no_grad()
    def predict(self, state: Neighbours, query_x: Tensor, query_mask: Tensor | None = None) -> Tensor:
        """Logits `[T, Q, N]`: minus the distance to each class."""
        return super().predict(state, query_x, query_mask)

    @torch.no_grad()
    def forward(self, batch, weights: Tensor | None = None) -> MetaOutput:
        """Loss and accuracy of the query sets; without gradient."""
        return super().forward(batch, weights)

    def extra_repr(self) -> str:
        return (
            f"rule={self.rule!r}, centre={self.centre!r}, normalise={self.normalise}, metric={self.metric!r}, "
            f"ways={self.ways}"
        )

    def _fit(self, features: Tensor, labels: Tensor, ways: int) -> Neighbours:
        centre = features.mean(1, keepdim=True) if self.centre == "support" else self.mean
        features = self._transform(features, centre)
        if self.rule == "nearest":
            return Neighbours(features, labels, ways, centre)
        return Neighbours(functional.class_prototypes(features, labels, ways), None, ways, centre)

    def _score(self, state: Neighbours, features: Tensor) -> Tensor:
        features = self._transform(features, state.centre)
        distance = functional.pairwise_distance(features, state.embeddings, self.metric)
        if state.labels is None:
            return -distance
        farthest = distance.new_full((*distance.shape[:2], state.num_classes), torch.inf)
        return -farthest.scatter_reduce(2, state.labels.unsqueeze(1).expand_as(distance), distance, "amin")

    def _transform(self, features: Tensor, centre: Tensor | None) -> Tensor:
        if centre is not None:
            if centre.shape[-1] != features.shape[-1]:
                raise ValueError(f"centre must have shape [D] = [{features.shape[-1]}], got {list(centre.shape)}")
            features = features - centre
        return F.normalize(features, dim=-1) if self.normalise else features
