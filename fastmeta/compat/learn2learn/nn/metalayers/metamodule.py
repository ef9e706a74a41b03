"""A module with some of its layers replaced."""

from __future__ import annotations

from torch import nn


class MetaModule(nn.Module):
    """`module` with each layer of a class in `substitutions` replaced by what the function there makes of it.

    Args:
        module: changed in place, and held as `wrapped_module`.
        substitutions: from classes of layers to functions of a layer.
        freeze_module: whether the original's parameters stop requiring gradients; True by default.
    """

    def __init__(self, module: nn.Module, substitutions, freeze_module: bool = True):
        super().__init__()
        self.substitutions = substitutions
        self.freeze_module = freeze_module
        self.wrapped_module = self._wrap(module)

    def _wrap(self, module: nn.Module) -> nn.Module:
        wrapped = self.substitutions[type(module)](module) if type(module) in self.substitutions else module
        for name, child in module.named_children():
            wrapped._modules[name] = self._wrap(child)
        if self.freeze_module:
            for p in module._parameters.values():
                if p is not None:
                    p.requires_grad = False
        return wrapped

    def _unwrap(self, module: nn.Module) -> nn.Module:
        base = module.module if hasattr(module, "module") else module
        for name, child in base.named_children():
            base._modules[name] = self._unwrap(child)
        return base

    def meta_parameters(self, module: nn.Module | None = None):
        """The parameters that the layers inside name in a `meta_parameters` of their own."""
        module = self.wrapped_module if module is None else module
        if hasattr(module, "meta_parameters"):
            yield from module.meta_parameters()
        for child in module.children():
            yield from self.meta_parameters(child)

    def module(self) -> nn.Module:
        """The original module, of layers that hold theirs as `module`; unwrapped in place."""
        return self._unwrap(self.wrapped_module)

    def forward(self, *args, **kwargs):
        return self.wrapped_module(*args, **kwargs)
