"""An inner loop of a multi-layer perceptron as the kernels take it: rows, layers in their order, and options."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fastmeta.functional.fast_weights import MLPFastWeights
from fastmeta.functional.inner_loops import MetaLoss, adapt_mlp, mean_meta_loss_mlp

from ._base import InnerLoop, Parameters
from .inspect import MLPSpec
from .layer_formulas import rows


class FusedLoop(NamedTuple):
    """An inner loop against which `FusedEngine.why_not` had nothing to say. Weights are given by name."""

    spec: MLPSpec
    inner: InnerLoop
    lr: Any  # the rates as `adapt_mlp` takes them, in place of `inner.lr`

    def adapt(self, weights: Parameters, x: Tensor, y: Tensor) -> MLPFastWeights:
        """The fast weights reached from `weights`, which are shared by the tasks or per task."""
        self._check_targets(weights, x, y, "support_y")
        return adapt_mlp(*self._data(x, y), *self._layers(weights), **self._options())

    def adapted(self, weights: Parameters, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """The same by name, `[T, *shape]` each."""
        fast_weights, fast_biases = self.adapt(weights, x, y).materialize()
        names = (*self.spec.weights, *(self.spec.biases if fast_biases else ()))
        return dict(zip(names, (*fast_weights, *fast_biases), strict=True))

    def meta_loss(
        self,
        slow: Parameters,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        task_weights: Tensor | None = None,
        masks: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> tuple[MetaLoss, Tensor]:
        """Query loss `[T]` and predictions `[T, Q, C]` in one call; and the mean of the losses times `task_weights`.
        masks: of support and query rows."""
        tensors, options = self.arguments(slow, support_x, support_y, query_x, query_y)
        return mean_meta_loss_mlp(*tensors, **options, task_weights=task_weights, masks=masks)

    def arguments(
        self, slow: Parameters, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> tuple[tuple, dict]:
        """What `mean_meta_loss_mlp` takes: tensors, and options."""
        self._check_targets(slow, support_x, support_y, "support_y")
        self._check_targets(slow, query_x, query_y, "query_y")
        tensors = (*self._data(support_x, support_y), *self._data(query_x, query_y), *self._layers(slow))
        return tensors, self._options()

    def prediction_shape(self, weights: Parameters, x: Tensor) -> tuple[int, int, int]:
        """`[T, B, C]` of inputs `[T, B, ...]`."""
        return (*x.shape[:2], weights[self.spec.weights[-1]].shape[-2])

    def _check_targets(self, weights: Parameters, x: Tensor, y: Tensor, name: str) -> None:
        self.inner.loss.check(self.prediction_shape(weights, x), y, name, values=False)  # the op looks at those

    def _data(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return rows(self.spec, x), self.inner.loss.kernel_targets(y)

    def _layers(self, weights: Parameters) -> tuple[list[Tensor], list[Tensor] | None]:
        biases = None if self.spec.biases[0] is None else [weights[name] for name in self.spec.biases]
        return [weights[name] for name in self.spec.weights], biases

    def _options(self) -> dict[str, Any]:
        hidden = self.spec.activations[0] if len(self.spec.activations) > 1 else "identity"
        return {
            "lr": self.lr,
            "steps": self.inner.steps,
            "loss": self.inner.loss.in_kernels,
            "huber_delta": self.inner.loss.huber_delta,
            "activation": hidden,
            "first_order": self.inner.first_order,
            "momentum": self.inner.rule.momentum,
            "weight_decay": self.inner.rule.weight_decay,
        }
