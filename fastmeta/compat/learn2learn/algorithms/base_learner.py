"""A module around a module, which answers for it."""

from __future__ import annotations

from torch import nn


class BaseLearner(nn.Module):
    """Holds `module`; attributes that it has not are the module's. `forward` calls the module."""

    def __init__(self, module: nn.Module | None = None):
        super().__init__()
        self.module = module

    def __getattr__(self, attr: str):
        try:
            return super().__getattr__(attr)
        except AttributeError:
            inside = self.__dict__.get("_modules", {}).get("module")
            if inside is None:
                raise
            return getattr(inside, attr)

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)
