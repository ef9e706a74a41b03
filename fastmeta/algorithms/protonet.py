"""Prototypical networks: an encoder, class means, and the nearest mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from fastmeta import functional, values
from fastmeta.dispatch.backends import METRICS

from ._classes import Classes
from ._embedding import EmbeddingLearner
from ._targets import cross_entropy
from .output import MetaOutput, classified, over_tasks

if TYPE_CHECKING:
    from ..tasks import TaskBatch


class Prototypes(NamedTuple):
    """What `ProtoNet.adapt` returns: one prototype per class, `[T, N, D]`."""

    prototypes: Tensor


class ProtoNet(EmbeddingLearner):
    """Prototypical networks (Snell et al. 2017, "Prototypical Networks for Few-shot Learning", equations 1 and 2).

    A class's prototype is the mean of its encoded support examples (equation 1); a query example has the
    logits `-distance(query, prototype)` (equation 2). Departures: any metric of
    `fastmeta.functional.pairwise_distance`.

    Args:
        encoder: any module from examples `[B, ...]` to embeddings `[B, D]`.
        metric: `"sqeuclidean"` (the paper's), `"euclidean"`, `"cosine"`, `"dot"` or `"manhattan"`.
        ways: the most classes `N` that a task may have; None, the default, sets no limit. With
            `fastmeta.check_labels(False)` the number of every task's, labelled 0 to N - 1, and nothing waits for a GPU.

    `forward` gives the mean cross entropy of the query sets, fused, so that in train mode the logits `[T, Q, N]` are
    never stored and come as None.

    The encoder runs once, over all support and query rows of all tasks together. So a batch norm in train
    mode uses the statistics of the whole task batch, and in eval mode its running statistics: evaluation is
    not transductive.
    """

    def __init__(self, encoder: nn.Module, *, metric: str = "sqeuclidean", ways: int | None = None):
        super().__init__(encoder, ways)
        self.metric = values.choice("metric", metric, METRICS)

    def extra_repr(self) -> str:
        return f"metric={self.metric!r}, ways={self.ways}"

    def _fit(self, features: Tensor, labels: Tensor, ways: int) -> Prototypes:
        return Prototypes(functional.class_prototypes(features, labels, ways))

    def _score(self, state: Prototypes, features: Tensor) -> Tensor:
        return -functional.pairwise_distance(features, state.prototypes, self.metric)

    def _tasks(self, support: Tensor, support_y: Tensor, query: Tensor, query_y: Tensor, ways: int) -> MetaOutput:
        task_loss, accuracy = functional.prototypical_loss(support, support_y, query, query_y, ways, self.metric)
        logits = None if self.training else self._score(self._fit(support, support_y, ways), query)
        return over_tasks(task_loss, accuracy, logits)

    def _unlike_tasks(self, batch: TaskBatch, classes: Classes) -> MetaOutput:
        if len(batch) == 4 and not classes.absent.any():  # alike but for the names of their classes
            return self._tasks(batch.support_x, classes.support_y, batch.query_x, classes.query_y, classes.ways)
        prototypes = Prototypes(classes.means(batch.support_x))
        logits = classes.without_absent(self._score(prototypes, batch.query_x))
        task_loss = cross_entropy(logits, classes.query_y, batch.query_mask)
        output = classified(task_loss, logits, classes.query_y, batch.query_mask)
        return output._replace(logits=None) if self.training else output
