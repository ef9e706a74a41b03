"""The weights that a multi-layer perceptron has after adaptation, one set per task."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmeta.ops._inner_loop import forward
from fastmeta.ops.functional_mlp import FUNCTIONS

from . import checks
from .mlp import Nets, functional_mlp


class LowRankLayer(NamedTuple):
    """A first layer whose fast weights are `weight - coefficients^T support_x`, and its bias less their sums."""

    weight: Tensor  # [1, O, I], the slow weights
    bias: Tensor | None  # [1, O]
    coefficients: Tensor  # [T, S, O]
    support_x: Tensor  # [T, S, I]


class MLPFastWeights(Nets):
    """Fast weights of `T` tasks, as `adapt_mlp` returns them; `functional_mlp(x, fast)` runs rows `[T, B, I]` through.

    `len(fast)` is `T`; `fast[3]` and `fast[2:5]` hold some of the tasks (one, too, keeps its task dimension);
    `fast.materialize()` gives the weights themselves. In low-rank form the first layer is held as coefficients of the
    support rows and never formed unless asked for.
    """

    def __init__(
        self,
        weights: list[Tensor],
        biases: list[Tensor],
        activation: str,
        low_rank: tuple | None = None,
        norm: Callable | None = None,
    ):
        self.weights = weights  # [T, O, I]; of all layers, or in low-rank form from the second on
        self.biases = biases  # [T, O], or none
        self.activation = activation
        self.low_rank = None if low_rank is None else LowRankLayer(*low_rank)
        self.norm = norm

    def __len__(self) -> int:
        return (self.weights[0] if self.low_rank is None else self.low_rank.coefficients).shape[0]

    def __getitem__(self, tasks: int | slice | Tensor) -> MLPFastWeights:
        if isinstance(tasks, int):
            if not -len(self) <= tasks < len(self):
                raise IndexError(f"task {tasks} of {len(self)}")
            tasks = slice(tasks % len(self), tasks % len(self) + 1)
        low_rank = self.low_rank
        if low_rank is not None:
            low_rank = low_rank._replace(coefficients=low_rank.coefficients[tasks], support_x=low_rank.support_x[tasks])
        return MLPFastWeights(
            [w[tasks] for w in self.weights], [b[tasks] for b in self.biases], self.activation, low_rank, self.norm
        )

    def materialize(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weights `[T, O, I]` and biases `[T, O]` (none for a net without) of all layers."""
        if self.low_rank is None:
            return list(self.weights), list(self.biases)
        layer = self.low_rank
        weight = torch.baddbmm(layer.weight, layer.coefficients.mT, layer.support_x, alpha=-1)
        biases = list(self.biases)
        if layer.bias is not None:
            biases.insert(0, layer.bias - layer.coefficients.sum(1))
        return [weight, *self.weights], biases

    def __call__(self, x: Tensor) -> Tensor:
        """The nets of all tasks on `x` `[T, B, I]`; `[T, B, O]`."""
        self._check(x)
        if self.norm is not None:
            return forward(x, self.weights, self.biases, self.activation, given=False, norm=self.norm)
        if self.low_rank is None:
            return functional_mlp(x, self.weights, self.biases or None, self.activation)
        layer = self.low_rank
        gram = torch.bmm(x, layer.support_x.mT)
        if layer.bias is not None:
            gram = gram + 1
        bias = None if layer.bias is None else layer.bias[0]
        z = torch.baddbmm(F.linear(x, layer.weight[0], bias), gram, layer.coefficients, alpha=-1)
        if not self.weights:
            return z
        return functional_mlp(FUNCTIONS[self.activation](z), self.weights, self.biases or None, self.activation)

    def _check(self, x: Tensor) -> None:
        like = self.weights[0] if self.low_rank is None else self.low_rank.support_x
        key = checks.key("fast weights", x, like)
        if checks.passed(key):
            return
        checks.tensor_of_any_shape("x", x, " of shape [T, B, I]")
        if x.dim() != 3 or x.shape[0] != len(self):
            raise ValueError(f"x must have shape [T, B, I] with T = {len(self)} tasks, got {list(x.shape)}")
        checks.same_size("x", x, 2, "I", "what the fast weights were made for", like.shape[2])
        if not torch.is_autocast_enabled(x.device.type):
            checks.same_kind("what the fast weights were made for", like, x=x)
        checks.remember(key)

    def __repr__(self) -> str:
        form = "onchip" if self.low_rank is None else "lowrank"
        widths = [w.shape[1] for w in self.weights]
        if self.low_rank is not None:
            widths.insert(0, self.low_rank.weight.shape[1])
        return f"MLPFastWeights({len(self)} tasks, {form}, layers of {', '.join(map(str, widths))}, {self.activation})"
