"""`higher.patch`: a copy of a module whose parameters are fast weights, tensors of any history."""

from __future__ import annotations

import functools
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .utils import get_func_params

# What a fresh module has anyway: hooks, above all, which stay with the original, as in higher.
_OF_EVERY_MODULE = set(nn.Module().__dict__) - {"training", "_non_persistent_buffers_set"}


class _MonkeyPatchBase:
    """What a patched module does in place of the module's own class.

    The newest fast weights stand in `_parameters`, where every layer looks for its weights, from the moment they are
    assigned; so forward is the module's own, and a submodule can be called by itself.
    """

    _root_ref: Callable[[], Any] | None = None  # of a submodule; weak, so that graphs are freed without waiting for gc
    _fast_params: list[list[Tensor]] | None = None
    _param_names: frozenset[str] = frozenset()
    _track_higher_grads = True

    def forward(self, *args, params: Iterable[Tensor] | None = None, **kwargs):
        root = self.root
        if params is not None:
            root.fast_params = params
        elif root._fast_params is None:
            raise ValueError("a patched module without fast weights of its own must be given them as params")
        return super().forward(*args, **kwargs)

    @property
    def is_root(self) -> bool:
        return self._root_ref is None

    @property
    def root(self):
        return self if self._root_ref is None else self._root_ref()

    @property
    def fast_params(self) -> list[Tensor] | None:
        """The newest fast weights, in the order of the module's parameters. Assigning a list makes it the newest."""
        return None if self._fast_params is None else self._fast_params[-1]

    @fast_params.setter
    def fast_params(self, value: Iterable[Tensor]) -> None:
        value = list(value)
        if self._fast_params is None or not self.track_higher_grads:
            self.__dict__["_fast_params"] = [value]
        else:
            self._fast_params.append(value)
        for parameters, name, index in self._places:
            parameters[name] = value[index]

    def update_params(self, params: Iterable[Tensor]) -> None:
        self.fast_params = params

    @property
    def init_fast_params(self) -> list[Tensor]:
        """The fast weights before the first step."""
        if not self.track_higher_grads:
            raise Exception("the initial fast weights are not kept when higher gradients are not tracked")
        return self._fast_params[0]

    @property
    def track_higher_grads(self) -> bool:
        return self._track_higher_grads

    @track_higher_grads.setter
    def track_higher_grads(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"Expected boolean argument. Got: {type(value)}.")
        self.__dict__["_track_higher_grads"] = value

    def parameters(self, recurse: bool = True, time: int | None = None) -> Iterator[Tensor]:
        """The fast weights after `time` updates; the newest by default, the initial ones at 0.

        Of a submodule, the newest of its own and those below it.
        """
        if not self.is_root:
            return super().parameters(recurse)
        if self._fast_params is None:
            raise Exception("the patched module has no fast weights of its own")
        if not recurse:
            warnings.warn(
                "parameters(recurse=False) of a patched module gives the fast weights of its submodules too",
                stacklevel=2,
            )
        time = -1 if time is None else time
        if not self.track_higher_grads and time not in (-1, 0):
            raise ValueError("only the latest fast weights are kept when higher gradients are not tracked")
        return iter(self._fast_params[time])

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._param_names:
            self._replace(name, value)
        elif isinstance(getattr(_MonkeyPatchBase, name, None), property):
            object.__setattr__(self, name, value)  # not as a module's, which takes tensors and modules apart
        else:
            super().__setattr__(name, value)

    def _replace(self, name: str, value: Tensor) -> None:
        """One fast weight, assigned as if it were a parameter."""
        if not isinstance(value, Tensor):
            raise TypeError(f"Require Tensor as fast weights. Got {torch.typename(value)}")
        root = self.root
        if root._fast_params is None:
            raise Exception("a patched module without fast weights of its own takes none for one parameter")
        index = next(i for parameters, n, i in root._places if parameters is self._parameters and n == name)
        root.fast_params = [value if i == index else p for i, p in enumerate(root.fast_params)]


class _Weak:
    """A weak reference that is one to the copy in a deep copy."""

    def __init__(self, to: Any):
        self.ref = weakref.ref(to)

    def __call__(self) -> Any:
        return self.ref()

    def __deepcopy__(self, memo: dict) -> _Weak:
        return _Weak(memo.get(id(self()), self()))


class _PatchedRNN(_MonkeyPatchBase):
    def flatten_parameters(self) -> None:
        """Nothing: fast weights do not lie in one piece of memory."""


@functools.lru_cache(maxsize=1024)
def _patched_class(of: type[nn.Module], name: str) -> type:
    base = _PatchedRNN if hasattr(of, "flatten_parameters") else _MonkeyPatchBase
    return type(name + of.__name__, (base, of), {"_wrapped_name": of.__name__, "__module__": of.__module__})


def make_functional(module: nn.Module, encapsulator: Callable[[Any, nn.Module], None] | None = None) -> Any:
    """A copy of a module without weights of its own, to be called with `params`; `encapsulator(copy, module)` may give
    it some."""
    order = {id(p): i for i, p in enumerate(module.parameters())}
    places: list[tuple[dict, str, int]] = []  # where the fast weight of an index goes
    fmodule = _copy_of(module, None, order, places, {})
    fmodule.__dict__["_places"] = places
    if encapsulator is not None:
        encapsulator(fmodule, module)
    return fmodule


def _copy_of(part: nn.Module, root: Any, order: dict[int, int], places: list, copies: dict[nn.Module, Any]) -> Any:
    if part in copies:
        return copies[part]
    if isinstance(part, _MonkeyPatchBase):
        raise ValueError("the module is patched already, or holds a patched module")
    kind = _patched_class(type(part), "Functional" if root is None else "InnerFunctional")
    copies[part] = new = kind.__new__(kind)
    nn.Module.__init__(new)
    state = new.__dict__
    for name, value in part.__dict__.items():
        if name not in _OF_EVERY_MODULE:
            # a method kept as an attribute would run on the original's weights
            own = isinstance(value, types.MethodType) and value.__self__ is part
            state[name] = types.MethodType(value.__func__, new) if own else value
    state["_root_ref"] = None if root is None else _Weak(root)
    state["_param_names"] = frozenset(name for name, p in part._parameters.items() if p is not None)
    new._parameters.update(dict.fromkeys(part._parameters))
    new._buffers.update(part._buffers)
    places.extend((new._parameters, name, order[id(p)]) for name, p in part._parameters.items() if p is not None)
    root = new if root is None else root
    for name, child in part._modules.items():
        new._modules[name] = None if child is None else _copy_of(child, root, order, places, copies)
    return new


def buffer_sync(module: nn.Module, fmodule: Any, device: torch.device | None = None) -> None:
    """Gives `fmodule` copies of the buffers of `module`, once."""
    for key, value in module._buffers.items():
        copy = value.clone().detach() if torch.is_tensor(value) else value
        fmodule._buffers[key] = copy if device is None or not torch.is_tensor(copy) else copy.to(device)
    for name, child in module._modules.items():
        if name not in fmodule._modules:
            raise KeyError(f"the patched module {fmodule} has no submodule {name}")
        if child is not None:
            buffer_sync(child, fmodule._modules[name], device)


def monkeypatch(
    module: nn.Module,
    device: torch.device | None = None,
    copy_initial_weights: bool = True,
    track_higher_grads: bool = True,
) -> Any:
    """A copy of `module` with fast weights and buffers of its own.

    `copy(x, params=weights)` runs on `weights` and keeps them; without, on the newest it has. Arguments as those of
    `innerloop_ctx`.
    """

    def encapsulator(fmodule: Any, module: nn.Module) -> None:
        if copy_initial_weights:
            params = get_func_params(module, device=device)
        else:
            params = [p.clone() if device is None else p.clone().to(device) for p in module.parameters()]
        buffer_sync(module, fmodule, device)
        fmodule.update_params(params)

    fmodule = make_functional(module, encapsulator)
    fmodule.track_higher_grads = track_higher_grads
    return fmodule
