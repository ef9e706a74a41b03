"""Relation Networks: the distance between a query and a class is learned too."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmeta import functional, values

from ._embedding import EmbeddingLearner
from ._rows import dense, groups_of, row_counts, with_padding
from ._targets import one_hot
from .output import MetaOutput, classified

POOLS = ("sum", "mean")
LOSSES = ("mse", "cross_entropy")


class ClassFeatures(NamedTuple):
    """What `RelationNetwork.adapt` returns: the pooled features of each class, `[T, N, D]` or `[T, N, C, H, W]`."""

    features: Tensor


class RelationNetwork(EmbeddingLearner):
    """Relation Networks (Sung et al. 2018, "Learning to Compare: Relation Network for Few-Shot Learning").

    A class is the sum of its support features (section 3.2, K-shot); the relation module sees it concatenated with the
    query's features and gives a score whose sigmoid is the relation `r` (equation 1), trained by mean squared error
    against 1 for the query's class and 0 for the others (equation 2). `predict` returns the score before the sigmoid,
    `[T, Q, N]`, which ranks the classes alike.

    Args:
        encoder: any module from examples `[B, ...]` to embeddings `[B, D]` or feature maps `[B, C, H, W]`, such as
            `relation_encoder()`.
        relation: a module from class features `[T, N, ...]` and query features `[T, Q, ...]` to scores `[T, Q, N]`:
            `RelationMLP` for embeddings, `RelationConv` for feature maps, or your own.
        pool: `"sum"` (the paper's) or `"mean"` of the class's support features. The same with one shot; with more, the
            mean allows other shots at test than in training.
        loss: `"mse"` (the paper's) or `"cross_entropy"` of the scores as logits.
        ways: the most classes `N` that a task may have; None, the default, sets no limit. With
            `fastmeta.check_labels(False)` the number of every task's, labelled 0 to N - 1, and nothing waits for a GPU.

    Departures: the mean over pairs, where the paper sums (scale the rate); the first layer of the relation module is
    computed for each class and each query and added up for each pair, which is the same function and cheaper.

    A relation module with batch norm sees, in train mode, the pairs of all tasks together; of tasks that differ in the
    numbers of rows or classes, those of tasks that are alike.

    Raises:
        ValueError: an unknown pool or loss, scores that are not `[T, Q, N]`, labels that do not fit. TypeError: labels
            that are not int64.
    """

    _feature_maps = True

    def __init__(
        self,
        encoder: nn.Module,
        relation: nn.Module,
        *,
        pool: str = "sum",
        loss: str = "mse",
        ways: int | None = None,
    ):
        super().__init__(encoder, ways)
        values.choice("pool", pool, POOLS)
        values.choice("loss", loss, LOSSES)
        self.relation, self.pool, self.loss = values.module("relation", relation), pool, loss

    def extra_repr(self) -> str:
        return f"pool={self.pool!r}, loss={self.loss!r}, ways={self.ways}"

    def _fit(self, features: Tensor, labels: Tensor, ways: int) -> ClassFeatures:
        pooled = functional.class_prototypes(features.flatten(2), labels, ways)
        if self.pool == "sum":
            pooled = pooled * one_hot(labels, ways, pooled.dtype).sum(1).unsqueeze(-1)
        return ClassFeatures(pooled.unflatten(2, features.shape[2:]))

    def _score(self, state: ClassFeatures, features: Tensor) -> Tensor:
        scores = self.relation(state.features, features)
        expected = (*features.shape[:2], state.features.shape[1])
        if scores.shape != expected:
            raise ValueError(f"relation must return scores [T, Q, N] = {list(expected)}, got {list(scores.shape)}")
        return scores

    def _score_rows(self, state: ClassFeatures, features: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return self._score(state, features)
        # the relation module may look at all rows, as batch norm does
        groups = groups_of(row_counts((features, mask)), mask.device)
        parts = [
            self._score(ClassFeatures(state.features[tasks]), dense(features, mask, tasks, rows))
            for tasks, (rows,) in groups
        ]
        return with_padding(parts, groups, mask)

    def _judge(self, logits: Tensor, query_y: Tensor) -> MetaOutput:
        if self.loss == "cross_entropy":
            return super()._judge(logits, query_y)
        target = one_hot(query_y, logits.shape[2], logits.dtype)
        return classified((logits.sigmoid() - target).square().mean((1, 2)), logits, query_y)


class RelationMLP(nn.Module):
    """The relation of two embeddings: a perceptron with one hidden layer on `[class, query]`.

    Args: features: D. hidden: width of the hidden layer.
    """

    def __init__(self, features: int, hidden: int = 64):
        super().__init__()
        values.count("features", features)
        values.count("hidden", hidden)
        self.of_class = nn.Linear(features, hidden)
        self.of_query = nn.Linear(features, hidden, bias=False)
        self.score = nn.Linear(hidden, 1)

    def forward(self, classes: Tensor, query: Tensor) -> Tensor:
        """`[T, N, D]` and `[T, Q, D]` -> `[T, Q, N]`."""
        pairs = self.of_query(query).unsqueeze(2) + self.of_class(classes).unsqueeze(1)
        return self.score(pairs.relu()).squeeze(-1)


class RelationConv(nn.Module):
    """The relation of two feature maps, as in the paper's figure 2: two blocks of 3x3 convolution, batch norm, ReLU and
    2x2 max-pooling on the concatenated channels, then two linear layers.

    Args:
        channels: C of the feature maps.
        hidden: channels of both blocks, 64.
        linear: width of the hidden linear layer, 8.
        size: height and width of the maps, at least 4; 7 for `relation_encoder()` on 28x28 images.
    """

    def __init__(self, channels: int = 64, hidden: int = 64, linear: int = 8, size: int = 7):
        super().__init__()
        for name, value in (("channels", channels), ("hidden", hidden), ("linear", linear)):
            values.count(name, value)
        values.count("size", size, 4)  # it is halved twice
        self.of_class = nn.Conv2d(channels, hidden, 3, padding=1)
        self.of_query = nn.Conv2d(channels, hidden, 3, padding=1, bias=False)
        self.rest = nn.Sequential(
            nn.BatchNorm2d(hidden),
            nn.MaxPool2d(2),  # before the ReLU: the same values, a quarter of the work
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.BatchNorm2d(hidden),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(hidden * (size // 4) ** 2, linear),
            nn.ReLU(),
            nn.Linear(linear, 1),
        )

    def forward(self, classes: Tensor, query: Tensor) -> Tensor:
        """`[T, N, C, H, W]` and `[T, Q, C, H, W]` -> `[T, Q, N]`."""
        if classes.dim() != 5:
            raise ValueError(f"RelationConv needs an encoder that returns maps [B, C, H, W], got {list(classes.shape)}")
        of_class = self.of_class(classes.flatten(0, 1)).unflatten(0, classes.shape[:2])
        of_query = self.of_query(query.flatten(0, 1)).unflatten(0, query.shape[:2])
        pairs = of_query.unsqueeze(2) + of_class.unsqueeze(1)
        return self.rest(pairs.flatten(0, 2)).view(*pairs.shape[:3])


def relation_encoder(in_channels: int = 1, hidden: int = 64) -> nn.Sequential:
    """The paper's embedding module: four blocks of 3x3 convolution, batch norm and ReLU, the first two with 2x2
    max-pooling. `[B, in_channels, 28, 28]` -> `[B, hidden, 7, 7]`."""
    values.count("in_channels", in_channels)
    values.count("hidden", hidden)
    blocks: list[nn.Module] = []
    for i, channels in enumerate((in_channels, hidden, hidden, hidden)):
        blocks += [nn.Conv2d(channels, hidden, 3, padding=1), nn.BatchNorm2d(hidden)]
        blocks += [nn.MaxPool2d(2)] if i < 2 else []
        blocks += [nn.ReLU()]
    return nn.Sequential(*blocks).to(memory_format=torch.channels_last)
