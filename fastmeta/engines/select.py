"""Picking an engine, and saying why."""

from __future__ import annotations

from torch import Tensor, nn

from fastmeta import values
from fastmeta._trees import first

from . import _convolutions as convolutions
from ._base import Engine, InnerLoop
from .fused import FusedEngine
from .inspect import hooked_layer
from .layer_formulas import why_no_formulas
from .layerwise import LayerwiseEngine, has_convolutions, has_formulas
from .loop import LoopEngine
from .lowrank import LowRankEngine
from .trial import why_not_trusted
from .vmap import VmapEngine

# Fastest first; the last one serves everything.
ENGINES: dict[str, Engine] = {
    engine.name: engine for engine in (FusedEngine(), LowRankEngine(), LayerwiseEngine(), VmapEngine(), LoopEngine())
}


def choose(
    name: str, model: nn.Module, inner: InnerLoop, support_x: Tensor, support_y: Tensor | None = None
) -> Engine:
    """The engine called `name`, or for `"auto"` the first that can serve and expects to be fastest.

    One that maps the module over tasks is tried first, once for a module and a size, and is taken if it agrees with
    plain autograd; without `support_y` in its predictions alone.

    An engine asked for by name is never replaced by another: if it cannot serve, ValueError says why.
    """
    if name == "auto":
        return ENGINES[_automatic(model, inner, support_x, support_y)]
    check_name(name)
    reason = ENGINES[name].why_not(model, inner, support_x)
    if reason is not None:
        raise ValueError(f"engine {name!r} cannot serve this model: {reason}")
    return ENGINES[name]


def module_engine(model: nn.Module, inner: InnerLoop, x: Tensor, y: Tensor | None = None) -> VmapEngine:
    """The engine that runs the module itself, whatever its layers: mapped over tasks, or one task after the other where
    `choose("auto", ...)` would not map it."""
    layerwise, vmap = ENGINES["layerwise"], ENGINES["vmap"]
    if (
        has_convolutions(model)
        and layerwise.why_not(model, inner, x) is None
        and _why_not_mapped(layerwise, model, inner, x) is None
        and why_not_trusted(layerwise, model, inner, x, y) is None
    ):
        return layerwise
    if _why_not_mapped(vmap, model, inner, x) is None and why_not_trusted(vmap, model, inner, x, y) is None:
        return vmap
    return ENGINES["loop"]


def _automatic(model: nn.Module, inner: InnerLoop, x: Tensor, y: Tensor | None) -> str:
    for name, engine in ENGINES.items():
        if _why_not_mapped(engine, model, inner, x) is not None:  # before anything runs the module to look at it
            continue
        if engine.why_not(model, inner, x) is not None or engine.why_slow(model, inner, x) is not None:
            continue
        if not _runs(engine, model, inner, x) or why_not_trusted(engine, model, inner, x, y) is None:
            return name
    raise AssertionError("the last engine serves everything")


def _runs(engine: Engine, model: nn.Module, inner: InnerLoop, x: Tensor) -> bool:
    """Whether the engine runs the module itself for all tasks at once."""
    if engine.name == "layerwise":
        return not has_formulas(model, inner, x)
    return engine.name == "vmap" or engine.name == "lowrank" and why_no_formulas(model, x) is not None


def _why_not_mapped(engine: Engine, model: nn.Module, inner: InnerLoop, x: Tensor) -> str | None:
    """Why the module should not run for all tasks at once, although it can."""
    if not _runs(engine, model, inner, x):
        return None
    hooked = hooked_layer(model)
    if hooked is not None:
        return f"layer {hooked!r} has hooks, which would see wrappers of all tasks' tensors"
    if engine.name == "layerwise":
        return None
    if engine.name == "lowrank" and has_convolutions(model):
        return "the model has convolutions, which the engine `layerwise` has kernels for"
    return convolutions.why_not_mapped(model, inner, x)


def check_name(name: str) -> None:
    """Raise ValueError unless `name` is `"auto"` or an engine's name."""
    values.choice("engine", name, ("auto", *ENGINES))


def explain(
    name: str, model: nn.Module, inner: InnerLoop, support_x: Tensor, support_y: Tensor | None = None
) -> str:
    """What `choose` does with the same arguments, one line per engine."""
    check_name(name)
    # an engine that would not map the module is not asked, since it would run it to look at it
    asked = [e for e in ENGINES.values() if e.name == name or _why_not_mapped(e, model, inner, support_x) is None]
    reasons = {e.name: e.why_not(model, inner, support_x) for e in asked}
    picked = name if name != "auto" else _automatic(model, inner, support_x, support_y)
    tasks, rows = first(support_x).shape[:2]
    order = "first order" if inner.first_order else "exact second order"
    lines = [
        f"{tasks} tasks, {rows} support examples each, {inner.steps} inner steps, {order}"
        + (", no graph over the steps" if inner.sweep else ""),
        f"loss {inner.loss.name!r}: {inner.loss.served}",
        f"asked for: {name}",
    ]
    for engine in ENGINES.values():
        if reasons.get(engine.name) is not None:
            verdict = f"cannot serve: {reasons[engine.name]}"
        elif engine.name == picked:
            verdict = f"picked: {engine.__doc__.splitlines()[0]}"
        elif name != "auto":
            verdict = "could serve, was not asked for"
        else:
            verdict = _why_passed_over(engine, model, inner, support_x, support_y)
        lines.append(f"  {engine.name}: {verdict}")
    return "\n".join(lines)


def _why_passed_over(engine: Engine, model: nn.Module, inner: InnerLoop, x: Tensor, y: Tensor | None) -> str:
    reason = _why_not_mapped(engine, model, inner, x) or engine.why_slow(model, inner, x)
    if reason is None and _runs(engine, model, inner, x):
        found = why_not_trusted(engine, model, inner, x, y)
        if found is not None:
            return f"cannot serve, as a trial on one task showed: {found}"
    return f"could serve, not taken: {reason or 'a more general engine'}"
