"""CAML as conditional modulation: a metric space of the classes shifts and scales the features of a second network.
There is no inner loop.

Two papers bear the name CAML. This is the one of 2019; that of 2024 is in `caml_incontext`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmeta import functional
from fastmeta.dispatch.backends import METRICS
from fastmeta.functional import checks

from ._arguments import check_tasks
from ._embedding import EmbeddingLearner, by_rows
from ._targets import check_labels, cross_entropy
from .output import MetaOutput, classified


class ModulatedPrototypes(NamedTuple):
    """What `ModulationCAML.adapt` returns: the class means in the metric space, `[T, N, D]`, which modulate, and those
    of the modulated features, `[T, N, F]`, which classify."""

    metric: Tensor
    prototypes: Tensor


class ModulationCAML(EmbeddingLearner):
    """The conditional modulation of class-aware meta-learning (Jiang et al. 2019, "Learning to Learn with Conditional
    Class Dependencies", section 3), with no inner loop: the gradient steps by which the paper adapts the modulated
    network to each task are not taken.

    A metric space, trained as a prototypical network, knows which classes are alike. Where an example lies in it, and
    among which class means of its task, conditions the base network that classifies: every normalised feature map
    becomes `(1 + gamma) * map + beta`, with `gamma` and `beta` computed from the condition (their conditionally
    transformed block). Here the condition of an example is `[f(x), sum_n a_n c_n]`: its embedding `f(x)` and the mean
    of the class means `c_n`, weighted by `a = softmax(-distance(f(x), c))`; support and query are treated alike.

    Departures: in place of the inner loop, gradient steps as in MAML, the base network classifies by the means of its
    modulated support features; the condition holds the task's class means; the metric space is trained together with
    the rest, by `metric_weight` times its own loss, where the paper trains it first. The loss of the metric space is
    added in train mode only.

    Args:
        encoder: the metric space `f`: any module from examples `[B, ...]` to embeddings `[B, D]`.
        base: a module from examples `[B, ...]` and conditions `[B, 2 D]` to features `[B, F]`: `FiLMConv4` for images,
            `FiLMMLP` for vectors, or your own.
        metric_weight: of the metric space's loss, 0.5.
        metric: of both spaces, as in `fastmeta.functional.pairwise_distance`.
        ways: the number of classes `N` of every task. None takes the largest support label of the batch plus one, which
            on a GPU waits for the device; give it in training loops there.

    A class without support examples has its means at zero.

    Raises:
        ValueError: an unknown metric, a negative weight, an encoder or base that does not return `[B, D]`, labels that
            do not fit. TypeError: labels that are not int64.
    """

    def __init__(
        self,
        encoder: nn.Module,
        base: nn.Module,
        *,
        metric_weight: float = 0.5,
        metric: str = "sqeuclidean",
        ways: int | None = None,
    ):
        super().__init__(encoder, ways)
        checks.choice("metric", metric, METRICS)
        if not metric_weight >= 0:
            raise ValueError(f"metric_weight must be at least 0, got {metric_weight!r}")
        self.base, self.metric, self.metric_weight = base, metric, metric_weight

    def extra_repr(self) -> str:
        return f"metric={self.metric!r}, metric_weight={self.metric_weight}, ways={self.ways}"

    def adapt(self, support_x: Tensor, support_y: Tensor) -> ModulatedPrototypes:
        """Class means in both spaces of support sets `[T, S, ...]` with labels int64 `[T, S]`."""
        embeddings = self._encode("support_x", support_x)
        num_classes = self._num_classes(support_y, embeddings)
        means = functional.class_prototypes(embeddings, support_y, num_classes)
        features = self._modulated(support_x, self._condition(embeddings, means))
        return ModulatedPrototypes(means, functional.class_prototypes(features, support_y, num_classes))

    def predict(self, state: ModulatedPrototypes, query_x: Tensor) -> Tensor:
        """Logits `[T, Q, N]`: minus the distance of the modulated features to each class mean."""
        embeddings = self._encode("query_x", query_x)
        check_tasks(embeddings, len(state.metric))
        features = self._modulated(query_x, self._condition(embeddings, state.metric))
        return -functional.pairwise_distance(features, state.prototypes, self.metric)

    def _all_tasks(self, batch) -> MetaOutput:
        """Mean cross entropy of the query sets, in train mode with that of the metric space; each network runs once."""
        support_x, support_y, query_x, query_y = batch
        self._check_examples(support_x, query_x)
        x = torch.cat([support_x, query_x], 1)
        sizes = [support_x.shape[1], query_x.shape[1]]
        embeddings = self._encode("support_x", x)
        support, query = embeddings.split(sizes, 1)
        num_classes = self._num_classes(support_y, support)
        means = functional.class_prototypes(support, support_y, num_classes)
        modulated_support, modulated_query = self._modulated(x, self._condition(embeddings, means)).split(sizes, 1)
        prototypes = functional.class_prototypes(modulated_support, support_y, num_classes)
        logits = -functional.pairwise_distance(modulated_query, prototypes, self.metric)
        check_labels("query_y", query_y, logits, num_classes)
        task_loss = cross_entropy(logits, query_y)
        if self.training and self.metric_weight:
            distance = functional.pairwise_distance(query, means, self.metric)
            task_loss = task_loss + self.metric_weight * cross_entropy(-distance, query_y)
        return classified(task_loss, logits, query_y)

    def _condition(self, embeddings: Tensor, means: Tensor) -> Tensor:
        """`[T, B, 2 D]`: where the rows lie, and near which of the task's classes."""
        near = torch.softmax(-functional.pairwise_distance(embeddings, means, self.metric), -1)
        return torch.cat([embeddings, near @ means], 2)

    def _modulated(self, x: Tensor, condition: Tensor) -> Tensor:
        return by_rows(self.base, "base", "features [B, F]", x, condition)
