"""Prototypical networks: an encoder, class means, and the nearest mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from fastmeta import functional

from .output import MetaOutput

if TYPE_CHECKING:
    from ..tasks import TaskBatch


class Prototypes(NamedTuple):
    """What `ProtoNet.adapt` returns: one prototype per class, `[T, N, D]`."""

    prototypes: Tensor


class ProtoNet(nn.Module):
    """Prototypical networks (Snell et al. 2017, "Prototypical Networks for Few-shot Learning", equations 1 and 2).

    A class's prototype is the mean of its encoded support examples (equation 1); a query example has the
    logits `-distance(query, prototype)` (equation 2). Departures: any metric of
    `fastmeta.functional.pairwise_distance`, and a class without support examples has its prototype at zero.

    Args:
        encoder: any module from examples `[B, ...]` to embeddings `[B, D]`.
        metric: `"sqeuclidean"` (the paper's), `"euclidean"`, `"cosine"`, `"dot"` or `"manhattan"`.
        ways: the number of classes `N` of every task. None takes the largest support label of the batch plus one,
            which on a GPU waits for the device; give it in training loops there.

    The encoder runs once, over all support and query rows of all tasks together. So a batch norm in train
    mode uses the statistics of the whole task batch, and in eval mode its running statistics: evaluation is
    not transductive.
    """

    def __init__(self, encoder: nn.Module, *, metric: str = "sqeuclidean", ways: int | None = None):
        super().__init__()
        if ways is not None and (isinstance(ways, bool) or not isinstance(ways, int) or ways < 1):
            raise ValueError(f"ways must be None or an int of at least 1, got {ways!r}")
        self.encoder = encoder
        self.metric = metric
        self.ways = ways

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Prototypes:
        """Prototypes of support sets `[T, S, ...]` with labels int64 `[T, S]`."""
        embeddings = self._encode(support_x)
        return Prototypes(functional.class_prototypes(embeddings, support_y, self._num_classes(support_y)))

    def predict(self, state: Prototypes, query_x: Tensor) -> Tensor:
        """Logits `[T, Q, N]`: minus the distance to each prototype."""
        return -functional.pairwise_distance(self._encode(query_x), state.prototypes, self.metric)

    def forward(self, batch: TaskBatch) -> MetaOutput:
        """Mean cross entropy of the query sets; fused, so that in train mode the logits `[T, Q, N]` are never stored
        and come as None."""
        support_x, support_y, query_x, query_y = batch
        if support_x.shape[2:] != query_x.shape[2:] or support_x.shape[0] != query_x.shape[0]:
            raise ValueError(
                f"support_x and query_x must agree in tasks and example shape, got {tuple(support_x.shape)} "
                f"and {tuple(query_x.shape)}"
            )
        embeddings = self._encode(torch.cat([support_x, query_x], 1))
        support, query = embeddings.split([support_x.shape[1], query_x.shape[1]], 1)
        num_classes = self._num_classes(support_y)
        task_loss, accuracy = functional.prototypical_loss(support, support_y, query, query_y, num_classes, self.metric)
        logits = None
        if not self.training:
            prototypes = functional.class_prototypes(support, support_y, num_classes)
            logits = -functional.pairwise_distance(query, prototypes, self.metric)
        return MetaOutput(task_loss.mean(), task_loss, accuracy, logits)

    def extra_repr(self) -> str:
        return f"metric={self.metric!r}, ways={self.ways}"

    def _num_classes(self, labels: Tensor) -> int:
        return self.ways if self.ways is not None else int(labels.max()) + 1

    def _encode(self, x: Tensor) -> Tensor:
        embeddings = self.encoder(x.flatten(0, 1))
        if embeddings.dim() != 2:
            raise ValueError(f"encoder must return embeddings [B, D], got shape {tuple(embeddings.shape)}")
        return embeddings.unflatten(0, x.shape[:2])
