"""A layer that computes with a transform of its parameters."""

from __future__ import annotations

from torch import nn


class ParameterTransform(nn.Module):
    """Calls `module` with each parameter passed through a transform of its own, and puts the parameters back.

    Args:
        module: a layer, with parameters of its own alone.
        transform: a callable from a parameter to the module that transforms it; they are held in
            `parameter_transforms` by the parameters' names.
    """

    def __init__(self, module: nn.Module, transform):
        super().__init__()
        self.module = module
        self.transform = transform
        self._parameter_names = [name for name, _ in module.named_parameters()]
        self.parameter_transforms = nn.ModuleDict({name: transform(p) for name, p in module.named_parameters()})

    def forward(self, *args, **kwargs):
        own = self.module._parameters
        originals = {name: own[name] for name in self._parameter_names}
        try:
            for name, p in originals.items():
                own[name] = self.parameter_transforms[name](p)
            return self.module(*args, **kwargs)
        finally:
            own.update(originals)

    def meta_parameters(self):
        for transform in self.parameter_transforms.values():
            yield from transform.parameters()
