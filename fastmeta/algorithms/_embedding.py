"""What the algorithms that work on an encoder's embeddings share: one pass through the encoder, checks, the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastmeta.dispatch.labels import label_range
from fastmeta.functional import checks

from ._arguments import check_size, check_tasks, check_weights
from ._targets import check_labels, check_targets, cross_entropy
from .output import MetaOutput, classified, over_tasks, weighted

if TYPE_CHECKING:
    from ..tasks import TaskBatch


class EmbeddingLearner(nn.Module):
    """An encoder, a state fitted to the support embeddings, predictions from the query embeddings.

    A subclass says what the state is in `_fit(features, targets)` and what it predicts in `_score(state, features)`;
    `features` are embeddings `[T, B, D]`. Both without a loop over tasks.

    The encoder runs once, over all support and query rows of all tasks together. So a batch norm in train mode uses
    the statistics of the whole task batch, and in eval mode its running statistics: evaluation is not transductive.
    """

    _feature_maps = False  # whether the encoder may return [B, C, H, W]

    def __init__(self, encoder: nn.Module, ways: int | None):
        super().__init__()
        self.encoder = encoder
        self.ways = check_size("ways", ways, or_none=True)

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Any:
        """The state of support sets `[T, S, ...]` with labels int64 `[T, S]` (regression: targets `[T, S, O]`)."""
        return self._fit(self._encode("support_x", support_x), support_y)

    def predict(self, state: Any, query_x: Tensor) -> Tensor:
        """Logits `[T, Q, N]` (regression: predictions `[T, Q, O]`) for `query_x` `[T, Q, ...]`."""
        features = self._encode("query_x", query_x)
        check_tasks(features, self._num_tasks(state))
        return self._score(state, features)

    def forward(self, batch: TaskBatch, weights: Tensor | None = None) -> MetaOutput:
        """Fit to every task's support set and judge on its query set. With `weights` `[T]` each task's loss counts that
        often in `loss`, which stays a mean over `T`; they may require gradients."""
        check_weights(weights, batch)
        return weighted(self._all_tasks(batch), weights)

    def _all_tasks(self, batch: TaskBatch) -> MetaOutput:
        """`forward` from the examples on."""
        support_x, support_y, query_x, query_y = batch
        self._check_examples(support_x, query_x)
        features = self._encode("support_x", torch.cat([support_x, query_x], 1))
        support, query = features.split([support_x.shape[1], query_x.shape[1]], 1)
        return self._tasks(support, support_y, query, query_y)

    def _tasks(self, support: Tensor, support_y: Tensor, query: Tensor, query_y: Tensor) -> MetaOutput:
        """`forward` from the embeddings on."""
        return self._judge(self._score(self._fit(support, support_y), query), query_y)

    def _fit(self, features: Tensor, targets: Tensor) -> Any:
        raise NotImplementedError

    def _score(self, state: Any, features: Tensor) -> Tensor:
        raise NotImplementedError

    def _check_examples(self, support_x: Tensor, query_x: Tensor) -> None:
        if support_x.shape[2:] != query_x.shape[2:] or support_x.shape[0] != query_x.shape[0]:
            raise ValueError(
                f"support_x and query_x must agree in tasks and example shape, got {tuple(support_x.shape)} "
                f"and {tuple(query_x.shape)}"
            )

    def _num_tasks(self, state: Any) -> int:
        return state[0].shape[0]

    def _judge(self, logits: Tensor, query_y: Tensor) -> MetaOutput:
        check_labels("query_y", query_y, logits, logits.shape[2])
        return classified(cross_entropy(logits, query_y), logits, query_y)

    def _num_classes(self, labels: Tensor, features: Tensor) -> int:
        """N of support labels, which are checked: int64, one for each row of `features`, in [0, N)."""
        checks.labels("support_y", labels, "[T, S]", features, "support_x")
        num_classes = self._ways(labels)
        label_range("support_y", labels, num_classes)
        return num_classes

    def _ways(self, labels: Tensor) -> int:
        """N of support labels as they are."""
        return self.ways if self.ways is not None else int(labels.max()) + 1

    def _encode(self, name: str, x: Tensor) -> Tensor:
        # what an nn.Embedding takes for an example, a number, has no dimensions of its own
        if x.dim() < 2 or (x.dim() == 2 and x.is_floating_point()):
            raise ValueError(f"{name} must have shape [T, B, ...], got {list(x.shape)}")
        if self._feature_maps:
            return by_rows(self.encoder, "encoder", "embeddings [B, D] or feature maps [B, C, H, W]", x, dims=(2, 4))
        return by_rows(self.encoder, "encoder", "embeddings [B, D]", x)


def by_rows(module: nn.Module, name: str, returns: str, *inputs: Tensor, dims: Sequence[int] = (2,)) -> Tensor:
    """`[T, B, ...]`: what `module` makes of the rows of all tasks together, of inputs `[T, B, ...]`.

    `name` and `returns` say in an error what the module is and should return, a tensor with so many dimensions.
    """
    features = module(*(x.flatten(0, 1) for x in inputs))
    if features.dim() not in dims:
        raise ValueError(f"{name} must return {returns}, got shape {tuple(features.shape)}")
    return features.unflatten(0, inputs[0].shape[:2])


def squared_error(prediction: Tensor, target: Tensor) -> MetaOutput:
    """The output of a regression: the mean squared error of each task."""
    check_targets("query_y", target, prediction)
    if target.shape != prediction.shape:
        raise ValueError(f"query_y must have shape [T, Q, O] = {list(prediction.shape)}, got {list(target.shape)}")
    return over_tasks((prediction - target).square().mean((1, 2)), logits=prediction)
