"""Ridge regression as the head: the best linear layer for a support set, in closed form and differentiable."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmeta import values

from ._embedding import EmbeddingLearner, squared_error
from ._targets import check_targets, one_hot
from .output import MetaOutput

LOSSES = ("cross_entropy", "mse")


class RidgeWeights(NamedTuple):
    """What `RidgeHead.adapt` returns: the linear layer of each task, `[T, D, N]` (regression: `[T, D, O]`)."""

    weights: Tensor


class RidgeHead(EmbeddingLearner):
    """R2-D2 (Bertinetto et al. 2019, "Meta-learning with differentiable closed-form solvers"): the encoder is learned
    through a ridge regression that is solved anew for every task.

    With support embeddings `X` `[S, D]` and targets `Y` (one-hot labels), `W = (X'X + lambda I)^-1 X'Y`, or, where
    S < D, `W = X'(XX' + lambda I)^-1 Y` (the Woodbury identity), so that the system solved is as small as it can be.
    Queries have the logits `scale * X W + bias` (all in their section 3.2). `lambda > 0` (by its logarithm), `scale`
    and `bias` are learned with the encoder.

    Args:
        encoder: any module from examples `[B, ...]` to embeddings `[B, D]`.
        loss: `"cross_entropy"` (labels int64 `[T, S]`) or `"mse"` (regression on targets `[T, S, O]`).
        ridge: where lambda starts, 1.
        scale: where the scale starts; None is 10 for classification, whose ridge predictions lie around 0 and 1, and 1
            for regression.
        bias: where the bias starts, 0.
        ways: the most classes `N` that a task may have; not used with `"mse"`; None, the default, sets no limit. With
            `fastmeta.check_labels(False)` the number of every task's, labelled 0 to N - 1, and nothing waits for a GPU.

    The system is solved in float32 at least, whatever autocast says. Departures: lambda is learned as `exp(log_ridge)`;
    the scale's start; regression.

    Raises:
        ValueError: an unknown loss, a ridge that is not positive, an encoder that does not return `[B, D]`, labels or
            targets that do not fit. TypeError: labels that are not int64, targets that are not floating.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        loss: str = "cross_entropy",
        ridge: float = 1.0,
        scale: float | None = None,
        bias: float = 0.0,
        ways: int | None = None,
    ):
        super().__init__(encoder, ways)
        values.choice("loss", loss, LOSSES)
        values.number("ridge", ridge, 0, open=True)
        values.number("bias", bias)
        if scale is None:
            scale = 10.0 if loss == "cross_entropy" else 1.0
        values.number("scale", scale)
        self.loss = loss
        self.log_ridge = nn.Parameter(torch.tensor(float(ridge)).log())
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.bias = nn.Parameter(torch.tensor(float(bias)))

    def extra_repr(self) -> str:
        return f"loss={self.loss!r}, ways={self.ways}"

    @property
    def _classifies(self) -> bool:
        return self.loss != "mse"

    def _fit(self, features: Tensor, targets: Tensor, ways: int | None) -> RidgeWeights:
        if self.loss == "mse":
            check_targets("support_y", targets, features)
        else:
            targets = one_hot(targets, ways, features.dtype)
        return RidgeWeights(ridge_weights(features, targets, self.log_ridge.exp()))

    def _score(self, state: RidgeWeights, features: Tensor) -> Tensor:
        return self.scale * (features.to(state.weights.dtype) @ state.weights) + self.bias

    def _judge(self, logits: Tensor, query_y: Tensor) -> MetaOutput:
        return squared_error(logits, query_y) if self.loss == "mse" else super()._judge(logits, query_y)


def ridge_weights(x: Tensor, y: Tensor, ridge: Tensor) -> Tensor:
    """The `W` `[T, D, O]` that minimises `|x W - y|^2 + ridge |W|^2` for `x` `[T, S, D]`, `y` `[T, S, O]`.

    Solves a system of size min(S, D) per task, all tasks at once and without waiting for the device; in float32 at
    least, whatever autocast says.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.to(wide), y.to(wide)
        added = ridge * torch.eye(min(x.shape[1:]), dtype=wide, device=x.device)
        transposed = x.transpose(1, 2)
        if x.shape[1] < x.shape[2]:
            return transposed @ torch.linalg.solve_ex(x @ transposed + added, y)[0]
        return torch.linalg.solve_ex(transposed @ x + added, transposed @ y)[0]
