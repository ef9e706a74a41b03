"""What every engine takes and gives.

An engine runs `K` steps of gradient descent on the support set of each of `T` tasks, all starting from the
same slow weights, and predicts the query set with the fast weights it reached. Everything it returns is
differentiable with respect to the slow weights: exactly, second derivatives included, unless `first_order`
asks for the inner gradients to count as constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from ._losses import Loss
from ._steps import PLAIN, Rates, Rule

Parameters = Mapping[str, Tensor]


class InnerLoop(NamedTuple):
    """What happens inside a task: `steps` times `w <- w - lr * gradient of loss(support)`, and what `rule` adds."""

    lr: float | Rates  # with rates by name what they name adapts, else whatever requires gradients
    steps: int
    first_order: bool
    loss: Loss
    target_gradients: bool = False  # the targets themselves are to be differentiated with respect to
    queries: int = 0  # query rows of a task, where there are some
    rule: Rule = PLAIN
    sweep: bool = False  # the meta-gradient is to be found without a graph over the steps


class Engine(Protocol):
    """One way to run inner loops. Engines hold no state: the model and its slow weights are handed in."""

    name: str

    def why_not(self, model: nn.Module, inner: InnerLoop, support_x: Tensor) -> str | None:
        """None if the engine can serve this, else a sentence that says why it cannot."""

    def why_slow(self, model: nn.Module, inner: InnerLoop, support_x: Tensor) -> str | None:
        """None, or why the next engine is expected to be faster here. Only asked when `why_not` is None."""

    def adapt(self, model: nn.Module, inner: InnerLoop, support_x: Tensor, support_y: Tensor) -> dict[str, Tensor]:
        """Fast weights by parameter name: `[T, *shape]` if adapted, `[*shape]` if still shared by all tasks."""

    def query(
        self, model: nn.Module, inner: InnerLoop, support_x: Tensor, support_y: Tensor, query_x: Tensor
    ) -> Tensor:
        """`adapt`, then `predict`, without handing out the fast weights, which an engine need not form."""

    def predict(self, model: nn.Module, weights: Parameters, x: Tensor) -> Tensor:
        """Predictions `[T, B, C]` for `x` `[T, B, ...]` under fast weights as `adapt` returns them."""


KEEPS_GRAPH = "memory='sweep' was asked for, and it keeps what its backward needs of all inner steps"


def is_shared(weight: Tensor, slow: Tensor) -> bool:
    """True for a weight that all tasks still share: fast weights have one dimension more."""
    return weight.dim() == slow.dim()
