"""What algorithms share whose inner loop has rates of its own, by parameter name (see `fastmeta/engines/_steps.py`).

A multi-layer perceptron runs in the fused inner loops (`fastmeta.functional.meta_loss_mlp`); anything else runs step by
step, under `torch.func` where that can follow it. Where an `nn.Sequential` begins with layers that do not adapt, these
run once, as an encoder.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastmeta._trees import tree_map

from ..engines import ENGINES, Engine, InnerLoop, Rates, module_engine
from ..engines.layerwise import has_formulas
from ._encoder import encoded
from ._inner_loop import InnerLoopAlgorithm
from .output import MetaOutput, judged


class RatedInnerLoop(InnerLoopAlgorithm):
    """An inner loop of gradient steps, with the rates that a subclass says in `_rates`."""

    def _rates(self, support_x: Tensor) -> Rates:
        raise NotImplementedError

    def _adapted(self, inner: InnerLoop, support_x: Tensor, support_y: Tensor) -> dict[str, Tensor]:
        inner = inner._replace(lr=self._rates(support_x))
        tail, (support_x,) = encoded(self.model, inner.lr, support_x)
        if inner.first_order:
            support_x = tree_map(Tensor.detach, support_x)
        return engine_for_rates(tail, inner, support_x, support_y).adapt(tail, inner, support_x, support_y)

    def _tasks(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor, weights: Tensor | None
    ) -> MetaOutput:
        inner = self._inner(support_y, query_y)._replace(lr=self._rates(support_x))
        tail, (support_x, query_x) = encoded(self.model, inner.lr, support_x, query_x)
        if inner.first_order:  # support rows reach the query loss through inner gradients alone
            support_x = tree_map(Tensor.detach, support_x)
        engine = engine_for_rates(tail, inner, support_x, support_y)
        if engine is ENGINES["fused"]:
            loop, slow = engine.loop(tail, inner)
            (task_loss, logits), mean = loop.meta_loss(slow, support_x, support_y, query_x, query_y, weights)
            return judged(inner.loss, logits, query_y, task_loss, mean)
        batch = support_x, support_y, query_x, query_y
        return self._queried(engine, tail, inner, batch, weights)


class LearnedRates(RatedInnerLoop):
    """One whose rates are trained: `rates` holds them by `_key` of the parameters' names, of frozen ones too."""

    rates: nn.ParameterDict

    @staticmethod
    def _key(name: str) -> str:
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        # frozen parameters had no rates once: where a saved state has none, they stay what they are
        used = {self._key(name) for name, p in self.model.named_parameters() if p.requires_grad}
        for key, rate in self.rates.items():
            if key not in used:
                state_dict.setdefault(f"{prefix}rates.{key}", rate.detach())
        super()._load_from_state_dict(state_dict, prefix, *args)


def engine_for_rates(model: nn.Module, inner: InnerLoop, x: Tensor, y: Tensor) -> Engine:
    """The kernels where they serve the model and its rates, formulas where the model has them, or what runs it."""
    if ENGINES["fused"].why_not(model, inner, x) is None:
        return ENGINES["fused"]
    if has_formulas(model, inner, x):
        return ENGINES["layerwise"]
    return module_engine(model, inner, x, y)
