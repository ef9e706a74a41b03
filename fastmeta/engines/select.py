"""Picking an engine, and saying why."""

from __future__ import annotations

from torch import Tensor, nn

from ._base import Engine, InnerLoop
from .fused import FusedEngine
from .layerwise import LayerwiseEngine
from .lowrank import LowRankEngine
from .vmap import VmapEngine

# Fastest first; the last one serves everything.
ENGINES: dict[str, Engine] = {
    engine.name: engine for engine in (FusedEngine(), LowRankEngine(), LayerwiseEngine(), VmapEngine())
}


def choose(name: str, model: nn.Module, inner: InnerLoop, support_x: Tensor) -> Engine:
    """The engine called `name`, or for `"auto"` the first that can serve and expects to be fastest.

    An engine asked for by name is never replaced by another: if it cannot serve, ValueError says why.
    """
    if name == "auto":
        return ENGINES[_automatic(model, inner, support_x)]
    check_name(name)
    reason = ENGINES[name].why_not(model, inner, support_x)
    if reason is not None:
        raise ValueError(f"engine {name!r} cannot serve this model: {reason}")
    return ENGINES[name]


def _automatic(model: nn.Module, inner: InnerLoop, support_x: Tensor) -> str:
    for name, engine in ENGINES.items():
        if engine.why_not(model, inner, support_x) is None and engine.why_slow(model, inner, support_x) is None:
            return name
    raise AssertionError("the last engine serves everything")


def check_name(name: str) -> None:
    """Raise ValueError unless `name` is `"auto"` or an engine's name."""
    if name != "auto" and name not in ENGINES:
        raise ValueError(f"engine must be one of {['auto', *ENGINES]}, got {name!r}")


def explain(name: str, model: nn.Module, inner: InnerLoop, support_x: Tensor) -> str:
    """What `choose` does with the same arguments, one line per engine."""
    check_name(name)
    reasons = {e.name: e.why_not(model, inner, support_x) for e in ENGINES.values()}
    picked = name if name != "auto" else _automatic(model, inner, support_x)
    order = "first order" if inner.first_order else "exact second order"
    lines = [
        f"{support_x.shape[0]} tasks, {support_x.shape[1]} support examples each, {inner.steps} inner steps, {order}",
        f"asked for: {name}",
    ]
    for engine in ENGINES.values():
        if reasons[engine.name] is not None:
            verdict = f"cannot serve: {reasons[engine.name]}"
        elif engine.name == picked:
            verdict = f"picked: {engine.__doc__.splitlines()[0]}"
        elif name != "auto":
            verdict = "could serve, was not asked for"
        else:
            verdict = f"could serve, slower: {engine.why_slow(model, inner, support_x) or 'a more general engine'}"
        lines.append(f"  {engine.name}: {verdict}")
    return "\n".join(lines)
