"""What algorithms share whose inner loop has rates of its own, by parameter name (see `_rates.py`).

A multi-layer perceptron runs in the fused inner loops (`fastmeta.functional.meta_loss_mlp`); anything else runs step by
step, under `torch.func` where that can follow it. Where an `nn.Sequential` begins with layers that do not adapt, these
run once, as an encoder.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastmeta._trees import first, tree_map

from ..engines import InnerLoop, module_engine
from ..engines.vmap import buffers_per_task
from ._encoder import encoded
from ._fused import fused_loop
from ._inner_loop import InnerLoopAlgorithm
from ._rates import Rates, stepped
from .output import MetaOutput, judged, weighted


class RatedInnerLoop(InnerLoopAlgorithm):
    """An inner loop of gradient steps, with the rates that a subclass says in `_rates`."""

    def _rates(self) -> Rates:
        raise NotImplementedError

    def _adapted(self, inner: InnerLoop, support_x: Tensor, support_y: Tensor) -> dict[str, Tensor]:
        rates = self._rates()
        tail, (support_x,) = encoded(self.model, rates, support_x)
        if inner.first_order:
            support_x = tree_map(Tensor.detach, support_x)
        loop = fused_loop(tail, inner, rates, support_x)
        if loop is None:
            return step_by_step(tail, inner, rates, support_x, support_y)
        fast = loop.adapted(dict(tail.named_parameters()), support_x, support_y)
        return {name: fast[name] for name in rates if name in fast}  # a head that is not in use does not change

    def _tasks(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor, weights: Tensor | None
    ) -> MetaOutput:
        inner, rates = self._inner(support_y, query_y), self._rates()
        tail, (support_x, query_x) = encoded(self.model, rates, support_x, query_x)
        if inner.first_order:  # support rows reach the query loss through inner gradients alone
            support_x = tree_map(Tensor.detach, support_x)
        loop = fused_loop(tail, inner, rates, support_x)
        if loop is None:
            engine = module_engine(tail, inner, support_x, support_y)
            batch = support_x, support_y, query_x, query_y
            if tail is self.model and self._in_turn(engine, *batch, weights):
                return self._chunked(1, batch, weights)
            fast = step_by_step(tail, inner, rates, support_x, support_y)
            return weighted(judged(inner.loss, engine.predict(tail, fast, query_x), query_y), weights)
        slow = dict(tail.named_parameters())
        (task_loss, logits), mean = loop.meta_loss(slow, support_x, support_y, query_x, query_y, weights)
        return judged(inner.loss, logits, query_y, task_loss, mean)


def step_by_step(model: nn.Module, inner: InnerLoop, rates: Rates, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The weights that adapt after the inner loop, `[T, *shape]`, on any module."""
    slow = dict(model.named_parameters())
    fast, engine = {name: slow[name] for name in rates}, module_engine(model, inner, x, y)
    for step in range(inner.steps):
        gradients = engine.gradients(model, inner, fast, buffers_per_task(model, len(first(x))), x, y)
        fast = stepped(fast, gradients, rates, step)
    return fast
