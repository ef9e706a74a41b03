"""A prototypical network whose features are modulated: a metric space of the classes shifts and scales them. There is
no inner loop."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmeta import functional, values
from fastmeta._trees import cat, first
from fastmeta.dispatch.backends import METRICS

from ._arguments import check_tasks
from ._classes import Classes
from ._embedding import EmbeddingLearner, both_masks, by_rows, check_examples, tasks_of
from ._targets import cross_entropy
from .output import MetaOutput, classified


class ModulatedPrototypes(NamedTuple):
    """What `ModulatedProtoNet.adapt` returns: the class means in the metric space, `[T, N, D]`, which modulate, and
    those of the modulated features, `[T, N, F]`, which classify; and the tasks' classes, where they are not 0 to N - 1
    in all."""

    metric: Tensor
    prototypes: Tensor
    classes: Classes | None


class ModulatedProtoNet(EmbeddingLearner):
    """Class means of features that a metric space modulates. The modulation is that of CAML (Jiang et al. 2019,
    "Learning to Learn with Conditional Class Dependencies", section 3), the classification that of prototypical
    networks (Snell et al. 2017): there is no inner loop. CAML itself is `ConditionalCAML`.

    A metric space, trained as a prototypical network, knows which classes are alike. Where an example lies in it, and
    among which class means of its task, conditions the base network that classifies: every normalised feature map
    becomes `(1 + gamma) * map + beta`, with `gamma` and `beta` computed from the condition (their conditionally
    transformed block). Here the condition of an example is `[f(x), sum_n a_n c_n]`: its embedding `f(x)` and the mean
    of the class means `c_n`, weighted by `a = softmax(-distance(f(x), c))`; support and query are treated alike.

    Departures from CAML: in place of the inner loop, gradient steps as in MAML, the base network classifies by the
    means of its modulated support features; the condition holds the task's class means; the metric space is trained
    together with the rest, by `metric_weight` times its own loss, where the paper trains it first. The loss of the
    metric space is added in train mode only.

    Args:
        encoder: the metric space `f`: any module from examples `[B, ...]` to embeddings `[B, D]`.
        base: a module from examples `[B, ...]` and conditions `[B, 2 D]` to features `[B, F]`: `FiLMConv4` for images,
            `FiLMMLP` for vectors, or your own.
        metric_weight: of the metric space's loss, 0.5.
        metric: of both spaces, as in `fastmeta.functional.pairwise_distance`.
        ways: the most classes `N` that a task may have; None, the default, sets no limit. With
            `fastmeta.check_labels(False)` the number of every task's, labelled 0 to N - 1, and nothing waits for a GPU.

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
        values.choice("metric", metric, METRICS)
        self.metric, self.metric_weight = metric, values.number("metric_weight", metric_weight, 0)
        self.base = values.module("base", base)

    def extra_repr(self) -> str:
        return f"metric={self.metric!r}, metric_weight={self.metric_weight}, ways={self.ways}"

    def adapt(
        self, support_x: Tensor, support_y: Tensor, support_mask: Tensor | None = None
    ) -> ModulatedPrototypes:
        """Class means in both spaces of support sets `[T, S, ...]` with labels int64 `[T, S]`; any labels and masks as
        in `ProtoNet.adapt`."""
        support_mask = check_examples("support_x", support_x, support_mask, "support_mask")
        ways, classes = self._classes(support_x, support_y, support_mask=support_mask)
        embeddings = self._encode_as("support_x", support_x, support_mask)
        means = _class_means(embeddings, support_y, ways, classes)
        features = self._modulated(support_x, self._condition(embeddings, means, classes), support_mask)
        return ModulatedPrototypes(means, _class_means(features, support_y, ways, classes), classes)

    def predict(self, state: ModulatedPrototypes, query_x: Tensor, query_mask: Tensor | None = None) -> Tensor:
        """Logits `[T, Q, C]`: minus the distance of the modulated features to each class mean; columns as in
        `ProtoNet.predict`."""
        query_mask = check_examples("query_x", query_x, query_mask, "query_mask")
        tasks = tasks_of(state, lambda state: len(state.metric))
        embeddings = self._encode_as("query_x", query_x, query_mask)
        check_tasks(embeddings, tasks)
        features = self._modulated(query_x, self._condition(embeddings, state.metric, state.classes), query_mask)
        logits = _scores(features, state.prototypes, self.metric, state.classes)
        if state.classes is not None:
            return state.classes.wide(logits, query_mask)
        return logits if query_mask is None else logits.masked_fill(~query_mask.unsqueeze(2), 0)

    def _all_tasks(self, batch) -> MetaOutput:
        """Mean cross entropy of the query sets, in train mode with that of the metric space; each network runs once."""
        masked = self._check_batch(batch)
        mask = both_masks(batch) if masked else None
        ways, classes = self._classes(*(batch if masked else batch[:4]))
        x = cat([batch.support_x, batch.query_x], 1)
        sizes = [first(part).shape[1] for part in (batch.support_x, batch.query_x)]
        embeddings = self._encode(x, mask)
        support, query = embeddings.split(sizes, 1)
        means = _class_means(support, batch.support_y, ways, classes)
        features = self._modulated(x, self._condition(embeddings, means, classes), mask)
        modulated_support, modulated_query = features.split(sizes, 1)
        prototypes = _class_means(modulated_support, batch.support_y, ways, classes)
        query_y = batch.query_y if classes is None else classes.query_y
        logits = _scores(modulated_query, prototypes, self.metric, classes)
        task_loss = cross_entropy(logits, query_y, batch.query_mask)
        if self.training and self.metric_weight:
            scores = _scores(query, means, self.metric, classes)
            task_loss = task_loss + self.metric_weight * cross_entropy(scores, query_y, batch.query_mask)
        output = classified(task_loss, logits, query_y, batch.query_mask)
        if classes is None:
            return output
        return output._replace(logits=classes.wide(logits, batch.query_mask), classes=classes.of_columns)

    def _condition(self, embeddings: Tensor, means: Tensor, classes: Classes | None = None) -> Tensor:
        """`[T, B, 2 D]`: where the rows lie, and near which of the task's classes."""
        near = torch.softmax(_scores(embeddings, means, self.metric, classes), -1)
        return torch.cat([embeddings, near @ means], 2)

    def _modulated(self, x: Tensor, condition: Tensor, mask: Tensor | None = None) -> Tensor:
        return by_rows(self.base, "base", "features [B, F]", x, mask=mask, condition=condition)


def _class_means(features: Tensor, labels: Tensor, ways: int | None, classes: Classes | None) -> Tensor:
    return functional.class_prototypes(features, labels, ways) if classes is None else classes.means(features)


def _scores(features: Tensor, means: Tensor, metric: str, classes: Classes | None) -> Tensor:
    """Minus the distances to the tasks' class means, -inf to those of classes that a task has not."""
    scores = -functional.pairwise_distance(features, means, metric)
    return scores if classes is None else classes.without_absent(scores)
