"""Whether an engine that maps a module over tasks can be trusted with it: tried once, against plain autograd.

What `torch.func` makes of a module cannot be known by looking: it refuses some (recurrent kernels, an
`autograd.Function` without its rules, a mask of the data's size), and what it differentiates wrongly it says nothing
about. So the first batch of its kind runs one inner step of one task in the engine and in plain autograd, and the two
must agree.
"""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastmeta._trees import first, flatten, kind, split, tree_map

from ._base import Engine, InnerLoop
from ._exact import outside_inference_mode
from ._steps import PLAIN, adapting
from .loop import LoopEngine

_LOOP = LoopEngine()
_MOST = 16  # sizes of support sets may vary without end
# relative to the largest gradient of a parameter; rounding is far below, a missing term far above
_CLOSE = {torch.float64: 1e-6, torch.float32: 1e-3}
# of the largest gradient of all: a parameter's that is less is compared as if it were that large. Of a convolution's
# bias before a batch norm there is nothing but rounding
_SMALL = 1e-2
_known: WeakKeyDictionary[nn.Module, dict[tuple, str | None]] = WeakKeyDictionary()


def why_not_trusted(engine: Engine, model: nn.Module, inner: InnerLoop, x: Tensor, y: Tensor | None) -> str | None:
    """None if `engine` does with `model` what plain autograd does, else why not; remembered by the module's layers and
    the kind of batch. Without targets `y` only predictions are tried. Warns once where they differ."""
    if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling() or not len(first(x)):
        return None
    found = _known.setdefault(model, {})
    key = _key(engine, model, inner, x, y)
    if key not in found:
        try:
            reason = _tried(engine, model, inner, split(x, 1)[0], None if y is None else split(y, 1)[0])
        except _Wrong:  # not remembered: what is wrong may be mended
            return "plain autograd cannot run it"
        if len(found) >= _MOST:
            found.clear()
        found[key] = reason
        if reason is not None:
            warnings.warn(
                f"tasks run one after the other (engine 'loop'), since engine {engine.name!r} cannot follow the model: "
                f"{reason.rstrip('.')}. All at once would be faster: with that layer written in what torch.func "
                "follows (docs/modules.md)",
                stacklevel=2,
            )
    return found[key]


def _key(engine: Engine, model: nn.Module, inner: InnerLoop, x: Tensor, y: Tensor | None) -> tuple:
    layers = tuple((layer, layer.training) for layer in model.modules() if layer is not model)
    named = dict(model.named_parameters())
    adapted = tuple(p.requires_grad for p in named.values()), frozenset(adapting(named, inner.lr))
    of_model = (engine.name, model.training, layers, adapted, inner.loss, inner.first_order, min(inner.steps, 1))
    return (*of_model, kind(x), None if y is None else kind(y), torch.is_grad_enabled())


class _Wrong(Exception):
    """Plain autograd fails."""


@outside_inference_mode
def _tried(engine: Engine, model: nn.Module, inner: InnerLoop, x: Tensor, y: Tensor | None) -> str | None:
    # a rate at which a missing term shows, for what adapts; what becomes of a gradient is the same in every engine
    lr = {n: torch.full_like(r[:1], 0.1) for n, r in inner.lr.items()} if isinstance(inner.lr, Mapping) else 0.1
    inner = inner._replace(steps=min(inner.steps, 1), lr=lr, rule=PLAIN)
    device = first(x).device
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):  # random layers must not find other numbers because of this
            plain = _values(_LOOP, model, inner, x, y)
    except Exception as error:  # which the loop will say again, in plain torch's words
        raise _Wrong from error
    try:
        with torch.random.fork_rng(devices):
            mapped = _values(engine, model, inner, x, y)
    except Exception as error:
        text = str(error).strip().splitlines()
        where = _layer_of(error, model)
        return f"{f'layer {where!r}: ' if where else ''}{text[0] if text else type(error).__name__}"
    if _agree(mapped, plain):
        return None
    with torch.random.fork_rng(devices):
        torch.rand(1, device=device)
        if not _agree(_values(_LOOP, model, inner, x, y), plain):
            return None  # random: nothing to compare
    if _agree_in_double(engine, model, inner, x, y):
        return None  # the difference was rounding, which a norm over few rows can make large
    return "its gradients are not those of plain autograd"


def _agree_in_double(engine: Engine, model: nn.Module, inner: InnerLoop, x: Tensor, y: Tensor | None) -> bool:
    """Whether it does in float64 what plain autograd does, on a copy of the module; False where there can be none."""

    def wide(leaf: Tensor) -> Tensor:
        return leaf.double() if leaf.dtype == torch.float32 else leaf

    try:
        copied = copy.deepcopy(model).double()
        x, y = tree_map(wide, x), None if y is None else tree_map(wide, y)
        with _Autocast(first(x).device.type) as autocast:
            plain = _values(_LOOP, copied, inner, x, y)
        return not autocast.switched and _agree(_values(engine, copied, inner, x, y), plain)
    except Exception:  # what holds float32 by itself, or cannot be copied
        return False


class _Autocast(TorchFunctionMode):
    """Whether a module switches autocast on for a part of itself, which float64 is left out of."""

    def __init__(self, device: str):
        self.device, self.outside, self.switched = device, torch.is_autocast_enabled(device), False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.switched = self.switched or torch.is_autocast_enabled(self.device) != self.outside
        return func(*args, **(kwargs or {}))


def _values(
    engine: Engine, model: nn.Module, inner: InnerLoop, x: Tensor, y: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Predictions of the same rows after a step, and the gradients of their loss, or of themselves where there are no
    targets."""
    x = tree_map(Tensor.detach, x)
    if y is None:
        predictions = engine.predict(model, dict(model.named_parameters()), x)
        values = found = [leaf for leaf in flatten(predictions)[0] if leaf.is_floating_point()]
    else:
        y = tree_map(Tensor.detach, y)
        predictions = engine.query(model, inner, x, y, x)
        found = [leaf for leaf in flatten(predictions)[0] if leaf.is_floating_point()]
        values = [inner.loss.per_task(predictions, y)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    values, found = [v for v in values if v.requires_grad], [leaf.detach() for leaf in (*found, *values)]
    if not (values and parameters):
        return found, []
    total = sum(value.square().sum() for value in values)
    return found, list(torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True))


def _agree(mapped: tuple[list[Tensor], list[Tensor]], plain: tuple[list[Tensor], list[Tensor]]) -> bool:
    least = _SMALL * max(map(_size, plain[1]), default=0.0)
    return _all_close(mapped[0], plain[0], 1e-3) and _all_close(mapped[1], plain[1], max(least, 1e-3))


def _all_close(values: list[Tensor], others: list[Tensor], least: float) -> bool:
    for value, other in zip(values, others, strict=True):
        if (value.shape, value.dtype) != (other.shape, other.dtype):
            return False
        close = _CLOSE.get(other.dtype, 1e-1)
        if not torch.allclose(value, other, rtol=close, atol=close * max(_size(other), least), equal_nan=True):
            return False
    return True


def _size(value: Tensor) -> float:
    """The largest of its finite numbers."""
    return float(value.abs().nan_to_num(0.0, 0.0, 0.0).max()) if value.numel() else 0.0


def _layer_of(error: BaseException, model: nn.Module) -> str | None:
    """The innermost layer of the model that was running."""
    names = {id(layer): name for name, layer in model.named_modules()}
    running = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = [names[id(layer)] for layer in running if isinstance(layer, nn.Module) and names.get(id(layer))]
    return found[-1] if found else None
