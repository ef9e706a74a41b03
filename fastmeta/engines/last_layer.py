"""Which layer a module uses last: found by watching it run, or where it is built so that this is certain."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fastmeta._trees import arguments, first

from ._replica import replica
from ._trace import is_harmless, mentioned

_PARAMETRIZATIONS = "parametrizations"


def last_layer(model: nn.Module, x: Tensor | None = None) -> tuple[str, ...] | str:
    """Names of the parameters of the layer that is used last, or why that cannot be known.

    A layer is the module that holds the parameters, with its parametrizations; of one that shares parameters, the one
    that is running. Where a chain of layers does not say it, the module runs on `x`, the examples `[B, ...]` of one
    task; without, on a symbol. Nothing that it does there stays.
    """
    found = _certain(model)
    if found is None:
        try:
            found = _watched(model, x)
        except Exception as error:  # anything can happen in a user's forward
            text = str(error).strip().splitlines()
            return text[0] if text else type(error).__name__
    return found or "no parameter is seen to be used"


def parameters_of_layer(model: nn.Module, layers: set[str]) -> tuple[str, ...]:
    """Names of the parameters of these layers, in the model's order; shared ones by the name that the model has for
    them."""
    owned = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if _layer_of(name) in layers}
    return tuple(name for name, p in model.named_parameters() if id(p) in owned)


def last_constructed(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of the layer that was made last."""
    layers = [_layer_of(name) for name, _ in model.named_parameters(remove_duplicate=False)]
    return parameters_of_layer(model, set(layers[-1:]))


def _layer_of(name: str) -> str:
    """The layer of a parameter, which is not its parametrization."""
    parts = name.split(".")[:-1]
    return ".".join(parts[: parts.index(_PARAMETRIZATIONS)] if _PARAMETRIZATIONS in parts else parts)


def _certain(model: nn.Module) -> tuple[str, ...] | None:
    """What the modules say by themselves: one layer alone, or the last one in nested `nn.Sequential`s."""
    layer, prefix = model, ""
    while True:
        layers = {_layer_of(prefix + name) for name, _ in layer.named_parameters(remove_duplicate=False)}
        if len(layers) <= 1:
            return parameters_of_layer(model, layers)
        if type(layer) is not nn.Sequential or "forward" in layer.__dict__:
            return None
        children = [(name, child) for name, child in layer._modules.items() if any(True for _ in child.parameters())]
        name, layer = children[-1]
        prefix += f"{name}."


def _watched(model: nn.Module, x: Tensor | None) -> tuple[str, ...]:
    watch, run = _Watch(model), replica(model)
    watch.layers = {id(layer): name for name, layer in run.named_modules()}
    args, kwargs = (fx.Proxy(watch.graph.placeholder("x"), watch.tracer),), {}
    devices = []
    if x is not None:
        args, kwargs = arguments(x)
        device = first(x).device
        devices = [device] if device.type == "cuda" else []
    # random layers must not find other numbers because the module was looked at first; with gradients, since without
    # autocast would keep weights that have none
    with torch.random.fork_rng(devices), torch.enable_grad(), watch:
        run(*args, **kwargs)
    return parameters_of_layer(model, watch.last)


class _Watch(TorchFunctionMode):
    """Notes the layers of the parameters in the last operation that takes any."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.owners: dict[str, list[str]] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            self.owners.setdefault(self.names[id(p)], []).append(_layer_of(name))
        self.layers: dict[int, str] = {}
        self.last: set[str] = set()
        self.graph = fx.Graph()
        self.tracer = _Tracer(self)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if not is_harmless(func):
            self.note(mentioned(self.names, (args, kwargs or {})))
        return output

    def note(self, names: set[str]) -> None:
        if names:
            self.last = {self._owner(name) for name in names}

    def _owner(self, name: str) -> str:
        owners = self.owners[name]
        if len(owners) == 1:
            return owners[0]
        return next((layer for layer in self._running() if layer in owners), owners[0])

    def _running(self) -> Iterator[str]:
        """The layers that are running, from within."""
        frame = sys._getframe()
        while frame is not None:
            name = self.layers.get(id(frame.f_locals.get("self")))
            if name is not None:
                yield _layer_of(f"{name}.")
            frame = frame.f_back


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Writes down what is done with a symbol, and tells of the parameters in it."""

    def __init__(self, watch: _Watch):
        super().__init__(watch.graph)
        self.watch = watch

    def create_arg(self, a):
        if isinstance(a, Tensor):
            self.watch.note(mentioned(self.watch.names, a))
            return a
        return super().create_arg(a)
