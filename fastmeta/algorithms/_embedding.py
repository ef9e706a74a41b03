"""What the algorithms that work on an encoder's embeddings share: one pass through the encoder, checks, the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.dispatch.labels import label_range
from fastmeta.functional import checks

from .output import MetaOutput

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
        if ways is not None and (isinstance(ways, bool) or not isinstance(ways, int) or ways < 1):
            raise ValueError(f"ways must be None or an int of at least 1, got {ways!r}")
        self.encoder = encoder
        self.ways = ways

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Any:
        """The state of support sets `[T, S, ...]` with labels int64 `[T, S]` (regression: targets `[T, S, O]`)."""
        return self._fit(self._encode("support_x", support_x), support_y)

    def predict(self, state: Any, query_x: Tensor) -> Tensor:
        """Logits `[T, Q, N]` (regression: predictions `[T, Q, O]`) for `query_x` `[T, Q, ...]`."""
        features = self._encode("query_x", query_x)
        if self._num_tasks(state) != len(features):
            raise ValueError(f"query_x has {len(features)} tasks, state has {self._num_tasks(state)}")
        return self._score(state, features)

    def forward(self, batch: TaskBatch) -> MetaOutput:
        """Fit to every task's support set and judge on its query set."""
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
        return judged(F.cross_entropy(logits.transpose(1, 2), query_y, reduction="none").mean(1), logits, query_y)

    def _num_classes(self, labels: Tensor, features: Tensor) -> int:
        """N of support labels, which are checked: int64, one for each row of `features`, in [0, N)."""
        checks.labels("support_y", labels, "[T, S]", features, "support_x")
        num_classes = self.ways if self.ways is not None else int(labels.max()) + 1
        label_range("support_y", labels, num_classes)
        return num_classes

    def _encode(self, name: str, x: Tensor) -> Tensor:
        if x.dim() < 3:
            raise ValueError(f"{name} must have shape [T, B, ...], got {list(x.shape)}")
        features = self.encoder(x.flatten(0, 1))
        if features.dim() != 2 and not (self._feature_maps and features.dim() == 4):
            allowed = "embeddings [B, D]" + (" or feature maps [B, C, H, W]" if self._feature_maps else "")
            raise ValueError(f"encoder must return {allowed}, got shape {tuple(features.shape)}")
        return features.unflatten(0, x.shape[:2])


def judged(task_loss: Tensor, logits: Tensor, labels: Tensor) -> MetaOutput:
    """The output of a classification whose losses `[T]` are known."""
    accuracy = (logits.argmax(-1) == labels).to(task_loss.dtype).mean(1)
    return MetaOutput(task_loss.mean(), task_loss, accuracy, logits)


def squared_error(prediction: Tensor, target: Tensor) -> MetaOutput:
    """The output of a regression: the mean squared error of each task."""
    check_targets("query_y", target, prediction)
    if target.shape != prediction.shape:
        raise ValueError(f"query_y must have shape [T, Q, O] = {list(prediction.shape)}, got {list(target.shape)}")
    task_loss = (prediction - target).square().mean((1, 2))
    return MetaOutput(task_loss.mean(), task_loss, None, prediction)


def check_labels(name: str, labels: Tensor, like: Tensor, num_classes: int) -> None:
    """`labels` are int64, one for each row of `like` `[T, B, ...]`, in [0, num_classes)."""
    checks.labels(name, labels, "[T, B]", like, "the examples")
    label_range(name, labels, num_classes)


def check_targets(name: str, targets: Tensor, like: Tensor) -> None:
    """`targets` are floating, `[T, B, O]`, one row for each row of `like`."""
    checks.tensor(name, targets, "[T, B, O]")
    if targets.shape[:2] != like.shape[:2]:
        raise ValueError(
            f"{name} must begin with the tasks and examples [T, B] = {list(like.shape[:2])}, got {list(targets.shape)}"
        )


def one_hot(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """`[T, B, N]` of 0 and 1; a label outside [0, N) gives a row of zeros."""
    return (labels.unsqueeze(-1) == torch.arange(num_classes, device=labels.device)).to(dtype)
