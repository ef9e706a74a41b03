"""Matching Networks: every support example votes for its class, weighted by its similarity to the query."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmeta import functional, values

from ._arguments import check_size
from ._embedding import EmbeddingLearner
from ._targets import one_hot
from .output import MetaOutput, classified


class MatchingSupport(NamedTuple):
    """What `MatchingNetwork.adapt` returns: support embeddings `[T, S, D]`, their labels `[T, S]`, and N."""

    embeddings: Tensor
    labels: Tensor
    num_classes: int


class MatchingNetwork(EmbeddingLearner):
    """Matching Networks (Vinyals et al. 2016, "Matching Networks for One Shot Learning").

    A query's class has the probability `sum_i a(x, x_i) y_i` (equation 1), where `a` is the softmax over the support
    set of the cosine similarity of the embeddings (section 2.1.1); `predict` returns its logarithm, `[T, Q, N]`.

    `full_context=True` adds the full context embeddings: a support example's embedding `g` is the encoder's plus the
    two outputs of a bidirectional LSTM that reads the support set (appendix A.2); a query's `f` is what an LSTM makes
    of the encoder's embedding in `steps` steps, each attending to the support set (equations 2 to 6). The LSTM reads
    the rows in the order given, so with it their order matters a little, as in the paper.

    Args:
        encoder: any module from examples `[B, ...]` to embeddings `[B, D]`.
        scale: what the cosine is multiplied with before the softmax. The paper has none, which is 1: the
            probabilities of five classes then stay between 0.03 and 0.65 and training is slow.
        learn_scale: whether the scale is learned (its logarithm is the parameter).
        full_context: the full context embeddings; needs `features`.
        features: D, the encoder's width; only for `full_context`.
        steps: K, processing steps of the query's LSTM.
        ways: the most classes `N` that a task may have; None, the default, sets no limit. With
            `fastmeta.check_labels(False)` the number of every task's, labelled 0 to N - 1, and nothing waits for a GPU.

    Departures: the scale, learned from 10 (`scale=1, learn_scale=False` is the paper); the query LSTM starts from
    zeros, which the paper leaves open.

    Raises:
        ValueError: a scale that is not positive, steps below 1, full context without `features`, an encoder that does
            not return `[B, D]`, labels that do not fit. TypeError: labels that are not int64.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        scale: float = 10.0,
        learn_scale: bool = True,
        full_context: bool = False,
        features: int | None = None,
        steps: int = 5,
        ways: int | None = None,
    ):
        super().__init__(encoder, ways)
        values.number("scale", scale, 0, open=True)
        values.flag("learn_scale", learn_scale)
        check_size("features", features, or_none=True)
        if values.flag("full_context", full_context) and features is None:
            raise ValueError("features must be the encoder's width D for full_context=True, got None")
        self.steps = check_size("steps", steps)
        self.full_context = full_context
        log_scale = torch.tensor(float(scale)).log()
        if learn_scale:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)
        if full_context:
            self.support_lstm = nn.LSTM(features, features, batch_first=True, bidirectional=True)
            # Equation 3 feeds [h, r] back. As the input holds r, the cell's own recurrence is left with h.
            self.query_lstm = nn.LSTMCell(2 * features, features)

    def extra_repr(self) -> str:
        return f"full_context={self.full_context}, steps={self.steps}, ways={self.ways}"

    def _fit(self, features: Tensor, labels: Tensor, ways: int) -> MatchingSupport:
        if self.full_context:
            both, _ = self.support_lstm(features)
            features = features + both.unflatten(2, (2, -1)).sum(2)
        return MatchingSupport(features, labels, ways)

    def _score(self, state: MatchingSupport, features: Tensor) -> Tensor:
        if self.full_context:
            features = self._attend(features, state.embeddings)
        cosine = 1 - functional.pairwise_distance(features, state.embeddings, "cosine")
        return class_log_probabilities(self.log_scale.exp() * cosine, state.labels, state.num_classes)

    def _attend(self, features: Tensor, support: Tensor) -> Tensor:
        """The query embeddings after `steps` steps of attention to the support set (equations 3 to 6)."""
        inputs = features.flatten(0, 1)
        hidden = torch.zeros_like(inputs)
        cell = torch.zeros_like(inputs)
        for _ in range(self.steps):
            weights = torch.softmax(-functional.pairwise_distance(hidden.view_as(features), support, "dot"), -1)
            read = (weights @ support).flatten(0, 1)
            hidden, cell = self.query_lstm(torch.cat([inputs, read], 1), (hidden, cell))
            hidden = hidden + inputs
        return hidden.view_as(features)

    def _judge(self, logits: Tensor, query_y: Tensor) -> MetaOutput:
        task_loss = -logits.gather(2, query_y.unsqueeze(2)).squeeze(2).mean(1)
        return classified(task_loss, logits, query_y)


def class_log_probabilities(scores: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Log of the class sums of `softmax(scores)`: `[T, Q, S]` and labels `[T, S]` -> `[T, Q, N]`.

    Exact for scores of any size: each class is summed relative to its own largest score. -inf for an absent class.
    """
    index = labels.unsqueeze(1).expand_as(scores)
    with torch.no_grad():
        empty = scores.new_full((*scores.shape[:2], num_classes), -torch.inf)
        largest = empty.scatter_reduce(2, index, scores, "amax")
        present = largest > -torch.inf
        largest = largest.masked_fill(~present, 0)
    sums = (scores - largest.gather(2, index)).exp() @ one_hot(labels, num_classes, scores.dtype)
    log_sums = largest + sums.masked_fill(~present, 1).log()
    return log_sums.masked_fill(~present, -torch.inf) - scores.logsumexp(2, keepdim=True)
