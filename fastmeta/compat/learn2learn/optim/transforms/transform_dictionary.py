"""Which transform which parameter has."""

from __future__ import annotations

from torch import nn


class TransformDictionary:
    """Called with a parameter, returns what the transform of its module, or its own, makes of it; None without one.

    Args:
        dictionary: from modules or parameters to transforms.

    Raises:
        ValueError: a key that is neither.
    """

    def __init__(self, dictionary):
        self.param_to_transform = {}
        for key, transform in dictionary.items():
            if not isinstance(key, (nn.Module, nn.Parameter)):
                raise ValueError("TransformDictionary only accepts Modules or Parameters as dictionary keys.")
            for p in key.parameters() if isinstance(key, nn.Module) else (key,):
                self.param_to_transform[p] = transform

    def __call__(self, param, *args, **kwargs):
        if param in self.param_to_transform:
            return self.param_to_transform[param](param, *args, **kwargs)
        return None
