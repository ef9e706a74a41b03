"""Which linear layers a module calls, found by watching its `forward` run once on one task.

Every `F.linear` comes by a `TorchFunctionMode`, whoever calls it: `nn.Linear`, a subclass, a custom `forward`. So does
every other use of a weight; and a weight that is used for anything else than a linear layer, or where a gradient
cannot be followed, is not reported. The engine then gives it a copy per task, which is right whatever a module does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..functional.run_again import call_with
from ._exact import twice_differentiable
from .vmap import buffers_per_task


class Use(NamedTuple):
    """One call of `F.linear`."""

    weight: str
    shape: tuple[int, ...]  # of the output, for one task

    @property
    def rows(self) -> int:
        return torch.Size(self.shape[:-1]).numel()


class Trace(NamedTuple):
    biases: dict[str, str | None]  # the weights, each with the bias that goes with it and with nothing else
    uses: tuple[Use, ...]  # in the order of the calls
    constant: frozenset[str]  # weights used once, on the examples themselves: the same rows in every inner step

    def only(self, weights: set[str]) -> Trace:
        return Trace(
            {weight: bias for weight, bias in self.biases.items() if weight in weights},
            tuple(use for use in self.uses if use.weight in weights),
            self.constant & weights,
        )


class PathChanged(Exception):
    """`forward` did not call the same linear layers as when it was traced."""


_traces: WeakKeyDictionary[nn.Module, dict[tuple, Trace | str]] = WeakKeyDictionary()


def traced(model: nn.Module, x: Tensor) -> Trace | str:
    """The linear layers that `model` calls on examples like `x` `[T, B, ...]`, or why that cannot be known."""
    known = _traces.setdefault(model, {})
    key = _key(model, x)
    if key not in known:
        if len(known) >= 16:  # sizes of support sets may vary without end
            known.clear()
        known[key] = _trace(model, x)
    return known[key]


def forget(model: nn.Module, x: Tensor) -> None:
    _traces[model].pop(_key(model, x), None)


def give_up(model: nn.Module, x: Tensor) -> None:
    _traces.setdefault(model, {})[_key(model, x)] = "its forward calls other linear layers from run to run"


def _key(model: nn.Module, x: Tensor) -> tuple:
    # the layers themselves, not their addresses, which new ones may have; without the model, which would live for ever
    layers = (model.training, *((layer, layer.training) for layer in model.modules() if layer is not model))
    adapted = tuple((name, p.requires_grad) for name, p in model.named_parameters())
    return layers, adapted, x.shape[1:], x.dtype, x.device


def _trace(model: nn.Module, x: Tensor) -> Trace | str:
    x = x[:1]
    watch = _Watch({name: p for name, p in model.named_parameters() if p.requires_grad})

    def one_task(buffers, x):
        watch.level = torch._C._functorch.maybe_current_level()
        with watch:
            call_with(model, buffers, (x,))
        return watch.inputs

    # random layers must not find other numbers because the module was looked at first
    with torch.random.fork_rng([x.device] if x.is_cuda else []), torch.enable_grad(), twice_differentiable():
        try:
            inputs = vmap(one_task, randomness="different")(buffers_per_task(model, 1), x)
        except Exception as error:  # anything can happen in a user's forward; the vmap engine says it as it is
            text = str(error).strip().splitlines()
            return f"its forward fails under torch.func: {text[0] if text else type(error).__name__}"
    return watch.result([is_part(a, x) for a in inputs])


class _Watch(TorchFunctionMode):
    def __init__(self, parameters: Mapping[str, Tensor]):
        super().__init__()
        self.names = {id(p): name for name, p in parameters.items()}
        self.level: int | None = None
        self.uses: list[Use] = []
        self.inputs: list[Tensor] = []
        self.paired: dict[str, set[str | None]] = {}
        self.otherwise: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.linear and can_probe(self.level):
            x, weight, bias = linear_arguments(*args, **kwargs)
            name = self.names.get(id(weight))
            if name is not None:
                self.uses.append(Use(name, tuple(output.shape)))
                self.inputs.append(x.reshape(-1, x.shape[-1]))
                self.paired.setdefault(name, set()).add(self.names.get(id(bias)))
                self.otherwise |= mentioned(self.names, x)
                return output
        if not is_harmless(func):
            self.otherwise |= mentioned(self.names, (args, kwargs))
        return output

    def result(self, constant: list[bool]) -> Trace:
        users = [bias for biases in self.paired.values() for bias in biases if bias is not None]
        found = {}
        for weight, biases in self.paired.items():
            bias = next(iter(biases)) if len(biases) == 1 else None
            found[weight] = bias if bias not in self.otherwise and users.count(bias) == 1 else None
        once = {use.weight for use in self.uses if sum(other.weight == use.weight for other in self.uses) == 1}
        fixed = frozenset(use.weight for use, c in zip(self.uses, constant, strict=True) if c and use.weight in once)
        return Trace(found, tuple(self.uses), fixed).only(found.keys() - self.otherwise)


def linear_arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def can_probe(level: int | None) -> bool:
    """Not inside an `autograd.Function` or a `no_grad` block, nor a transform that `forward` itself applies."""
    return torch.is_grad_enabled() and torch._C._functorch.maybe_current_level() == level


# What may be asked of a weight without using its values.
_HARMLESS = {"shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout", "size", "dim", "numel"}


def is_harmless(func: Callable) -> bool:
    descriptor = getattr(func, "__self__", None)  # of `Tensor.shape.__get__`
    return (getattr(descriptor, "__name__", None) or getattr(func, "__name__", "")) in _HARMLESS


def mentioned(names: Mapping[int, str], arguments: object) -> set[str]:
    """Names of the tensors among these arguments, in lists, tuples and dictionaries too."""
    if isinstance(arguments, Tensor):
        return {names[id(arguments)]} if id(arguments) in names else set()
    if isinstance(arguments, dict):
        arguments = tuple(arguments.values())
    if isinstance(arguments, (list, tuple)):
        return set().union(*(mentioned(names, argument) for argument in arguments))
    return set()


def is_part(a: Tensor, x: Tensor) -> bool:
    """Whether `a` is a view of `x`."""
    if torch._C._are_functorch_transforms_active():
        return False  # a wrapper hides where its values are
    return a.numel() > 0 and a.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
