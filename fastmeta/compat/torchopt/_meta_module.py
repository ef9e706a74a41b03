"""A module that tells its own parameters from those that it was given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import pytree


class MetaGradientModule(nn.Module):
    """What the constructor is given, tensors that require gradients and modules in training mode, is meta: assigned to
    an attribute it is listed by `meta_parameters` and not by `parameters`. Any tensor that requires gradients is a
    parameter, not only an `nn.Parameter`."""

    def __new__(cls, *args: Any, **kwargs: Any):
        self = super().__new__(cls)
        given = pytree.tree_leaves((args, kwargs))
        modules = {part for m in given if isinstance(m, nn.Module) and m.training for part in m.modules()}
        tensors = [t for t in given if isinstance(t, Tensor) and t.requires_grad]
        tensors += [p for m in modules for p in m.parameters(recurse=False)]
        self.__dict__["_meta_inputs"] = {id(x): x for x in (*tensors, *modules)}
        self.__dict__["_meta_parameters"] = {}
        self.__dict__["_meta_modules"] = {}
        return self

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def __getattr__(self, name: str) -> Any:
        for place in ("_meta_parameters", "_meta_modules"):
            if name in self.__dict__.get(place, ()):
                return self.__dict__[place][name]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.requires_grad or isinstance(value, nn.Module):
            if "_parameters" not in self.__dict__:
                what = "module" if isinstance(value, nn.Module) else "parameters"
                raise AttributeError(f"cannot assign {what} before Module.__init__() call")
            self._forget(name)
            given = id(value) in self._meta_inputs
            if isinstance(value, nn.Module):
                (self._meta_modules if given else self._modules)[name] = value
            elif given:
                self.register_meta_parameter(name, value)
            else:
                self.register_parameter(name, value)
        elif name in self.__dict__.get("_meta_parameters", ()):
            if value is not None:
                raise TypeError(f"cannot assign {torch.typename(value)} as meta-parameter {name!r}")
            self._meta_parameters[name] = None
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        for place in (self._meta_parameters, self._meta_modules):
            if name in place:
                del place[name]
                return
        super().__delattr__(name)

    def _forget(self, name: str) -> None:
        places = (self._parameters, self._buffers, self._modules, self._meta_parameters, self._meta_modules)
        for place in (self.__dict__, *places):
            place.pop(name, None)
        self._non_persistent_buffers_set.discard(name)

    def _check_new(self, what: str, name: str, value: Any, kind: type, home: dict) -> None:
        if not isinstance(name, str):
            raise TypeError(f"{what} name should be a string. Got {torch.typename(name)}")
        if "." in name:
            raise KeyError(f"{what} name can't contain '.'")
        if name == "":
            raise KeyError(f"{what} name can't be empty string ''")
        if hasattr(self, name) and name not in home:
            raise KeyError(f"attribute {name!r} already exists")
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"cannot assign {torch.typename(value)} object to {what} {name!r}")
        if isinstance(value, Tensor) and not value.requires_grad:
            raise ValueError(f"cannot assign Tensor that `requires_grad=False` to {what} {name!r}")

    def register_parameter(self, name: str, param: Tensor | None) -> None:
        """Any tensor that requires gradients, and was not given to the constructor."""
        if "_parameters" not in self.__dict__:
            raise AttributeError("cannot assign parameter before Module.__init__() call")
        self._check_new("parameter", name, param, Tensor, self._parameters)
        if id(param) in self._meta_inputs:
            raise ValueError(
                f"cannot assign Tensor that is a meta-parameter to parameter {name!r}. "
                "Use self.register_meta_parameter() instead."
            )
        self._parameters[name] = param

    def register_meta_parameter(self, name: str, param: Tensor | None) -> None:
        """Any tensor that requires gradients."""
        self._check_new("meta-parameter", name, param, Tensor, self._meta_parameters)
        self._meta_parameters[name] = param

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._check_new("module", name, module, nn.Module, self._modules)
        if id(module) in self._meta_inputs:
            raise ValueError(
                f"cannot add module that is a meta-module to module {name!r}. Use self.add_meta_module() instead."
            )
        self._modules[name] = module

    def register_module(self, name: str, module: nn.Module | None) -> None:
        self.add_module(name, module)

    def add_meta_module(self, name: str, meta_module: nn.Module | None) -> None:
        self._check_new("meta-module", name, meta_module, nn.Module, self._meta_modules)
        self._meta_modules[name] = meta_module

    register_meta_module = add_meta_module

    def meta_parameters(self, recurse: bool = True) -> Iterator[Tensor]:
        for _, p in self.named_meta_parameters(recurse=recurse):
            yield p

    def named_meta_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of what is meta here; those of modules with the modules' names before them."""
        seen: set[int] = set()
        for name, p in self._meta_parameters.items():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                yield prefix + name, p
        for name, module in self.named_meta_children():
            yield from module.named_parameters(prefix + name, recurse)

    def meta_children(self) -> Iterator[nn.Module]:
        for _, module in self.named_meta_children():
            yield module

    def named_meta_children(self) -> Iterator[tuple[str, nn.Module]]:
        seen: set[nn.Module] = set()
        for name, module in self._meta_modules.items():
            if module is not None and module not in seen:
                seen.add(module)
                yield name, module

    def meta_modules(self) -> Iterator[nn.Module]:
        for _, module in self.named_meta_modules():
            yield module

    def named_meta_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        memo = set() if memo is None else memo
        for name, module in self._meta_modules.items():
            if module is not None:
                path = f"{prefix}.{name}" if prefix else name
                yield from module.named_modules(memo, path, remove_duplicate)
