"""Contrastive learning without labels, and a linear head on the frozen encoder for every few-shot task."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta import functional, values
from fastmeta._trees import cat, named_leaves

from ._arguments import check_size
from ._embedding import EmbeddingLearner, by_rows, check_examples
from ._targets import one_hot
from .output import MetaOutput, over_tasks
from .ridge import ridge_weights

if TYPE_CHECKING:
    from ..tasks import TaskBatch

HEADS = ("mean", "ridge")
CENTRES = ("none", "support")
FEATURES = ("encoder", "projection")


class LinearHead(NamedTuple):
    """What `Contrastive.adapt` returns: a linear layer per task, `[T, D, N]` and `[T, 1, N]`, and the mean subtracted
    from features before it, `[T, 1, D]` (None without centring)."""

    weights: Tensor
    bias: Tensor
    centre: Tensor | None


class Contrastive(EmbeddingLearner):
    """SimCLR for few-shot tasks (Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual
    Representations"; what Medina et al. 2020, "Self-Supervised Prototypical Transfer Learning for Few-Shot
    Classification", do with prototypes in place of pairs).

    In train mode `forward` takes the support set and the query set of a task for two views of the same B images in the
    same order, as `fastmeta.tasks.AugmentedTasks` with one shot, one query shot and `augment_support=True` draws them,
    and its loss is NT-Xent (equation 1) of their projections: labels are not looked at. In eval mode, and in `adapt`
    and `predict`, the encoder is frozen: embeddings are divided by their norm, and a linear head is fitted to the
    support set.

    Args:
        encoder: any module from examples `[B, ...]` to embeddings `[B, D]`.
        projection: from embeddings `[B, D]` to what the loss compares, `[B, P]`; None compares the embeddings.
        temperature: of the loss, and of the logits.
        features: what the head sees, embeddings of the `"encoder"` (the paper's), or their `"projection"`.
        head: where the linear head starts: `"mean"` (the nearest class mean, written as a linear layer, Snell et al.
            2017, section 2.4) or `"ridge"` (ridge regression on one-hot labels).
        centre: what is subtracted before embeddings are divided by their norm: `"none"` or `"support"` (the mean of
            the task's support embeddings).
        ridge: the penalty of `"ridge"`.
        fine_tune_steps: gradient steps of the head on the support set's cross entropy (the paper of Medina et al.
            calls it ProtoTune, and moves the encoder too); 0 leaves it where it starts.
        fine_tune_lr: their size.
        ways: the most classes `N` that a task may have, in eval mode; None, the default, sets no limit. With
            `fastmeta.check_labels(False)` the number of every task's, labelled 0 to N - 1, and nothing waits for a GPU.

    The encoder runs once over both views of all tasks: batch norm in train mode has the statistics of all of them, in
    eval mode its running statistics. In train mode the output has no accuracy and no logits.

    Raises:
        ValueError: an unknown head or centre, numbers out of range, an encoder that does not return `[B, D]`, views of
            different sizes, labels that do not fit. TypeError: labels that are not int64.
    """

    def __init__(
        self,
        encoder: nn.Module,
        projection: nn.Module | None = None,
        *,
        temperature: float = 0.5,
        features: str = "encoder",
        head: str = "mean",
        centre: str = "none",
        ridge: float = 0.1,
        fine_tune_steps: int = 0,
        fine_tune_lr: float = 0.1,
        ways: int | None = None,
    ):
        super().__init__(encoder, ways)
        values.choice("features", features, FEATURES)
        values.choice("head", head, HEADS)
        values.choice("centre", centre, CENTRES)
        for name, value in (("temperature", temperature), ("ridge", ridge), ("fine_tune_lr", fine_tune_lr)):
            values.number(name, value, 0, open=True)
        self.projection = nn.Identity() if projection is None else values.module("projection", projection)
        self.features = features
        self.temperature, self.head, self.centre, self.ridge = float(temperature), head, centre, float(ridge)
        self.fine_tune_steps = check_size("fine_tune_steps", fine_tune_steps, 0)
        self.fine_tune_lr = float(fine_tune_lr)

    @torch.no_grad()
    def adapt(self, support_x: Tensor, support_y: Tensor, support_mask: Tensor | None = None) -> LinearHead:
        """The linear heads of support sets `[T, S, ...]` with labels int64 `[T, S]`; any labels and masks as in
        `ProtoNet.adapt`."""
        return super().adapt(support_x, support_y, support_mask)

    @torch.no_grad()
    def predict(self, state: LinearHead, query_x: Tensor, query_mask: Tensor | None = None) -> Tensor:
        """Logits `[T, Q, N]`."""
        return super().predict(state, query_x, query_mask)

    def _all_tasks(self, batch: TaskBatch) -> MetaOutput:
        """Train mode: NT-Xent of two views, differentiable. Eval mode: loss and accuracy of the query sets, without
        gradient."""
        if not self.training:
            with torch.no_grad():
                return super()._all_tasks(batch)
        if len(batch) > 4:
            raise ValueError("batch: support_mask and query_mask are served in eval mode alone, two views have none")
        first, second = batch.support_x, batch.query_x
        check_examples("support_x", first)
        shapes = [[tuple(leaf.shape) for _, leaf in named_leaves(view, "")] for view in (first, second)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                "support_x and query_x must be two views of the same images, of one shape [T, B, ...], got "
                f"{shapes[0]} and {shapes[1]}: train with one shot and one query shot"
            )
        views = self._project(self._encode(cat([first, second], 1)))
        return over_tasks(functional.contrastive_loss(*views.chunk(2, 1), self.temperature))

    def _check_tasks(self, batch: TaskBatch) -> None:
        if not self.training:
            super()._check_tasks(batch)

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, features={self.features!r}, head={self.head!r}, centre={self.centre!r}, "
            f"fine_tune_steps={self.fine_tune_steps}, ways={self.ways}"
        )

    def _fit(self, features: Tensor, labels: Tensor, ways: int) -> LinearHead:
        features = self._seen(features)
        centre = features.mean(1, keepdim=True) if self.centre == "support" else None
        features = self._transform(features, centre)
        targets = one_hot(labels, ways, features.dtype)
        if self.head == "ridge":
            weights = ridge_weights(features, targets, features.new_tensor(self.ridge)).to(features) / self.temperature
            bias = features.new_zeros(len(features), 1, ways)
        else:
            means = functional.class_prototypes(features, labels, ways)
            # -|x - m|^2 / (2 temperature) but for |x|^2, which is the same for all classes
            weights = means.transpose(1, 2) / self.temperature
            bias = means.square().sum(2).unsqueeze(1) / (-2 * self.temperature)
        for _ in range(self.fine_tune_steps):
            error = (torch.softmax(features @ weights + bias, 2) - targets) / features.shape[1]
            weights = weights - self.fine_tune_lr * (features.transpose(1, 2) @ error)
            bias = bias - self.fine_tune_lr * error.sum(1, keepdim=True)
        return LinearHead(weights, bias, centre)

    def _score(self, state: LinearHead, features: Tensor) -> Tensor:
        return self._transform(self._seen(features), state.centre) @ state.weights + state.bias

    def _seen(self, features: Tensor) -> Tensor:
        return self._project(features) if self.features == "projection" else features

    def _project(self, features: Tensor) -> Tensor:
        return by_rows(self.projection, "projection", "[B, P]", features)

    @staticmethod
    def _transform(features: Tensor, centre: Tensor | None) -> Tensor:
        return F.normalize(features if centre is None else features - centre, dim=-1)
