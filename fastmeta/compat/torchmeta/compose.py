"""One transform after the other, so that torchvision is not needed for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Compose:
    """As `torchvision.transforms.Compose`, which may stand in its place everywhere here."""

    def __init__(self, transforms: Sequence[Callable]):
        self.transforms = transforms

    def __call__(self, value):
        for transform in self.transforms:
            value = transform(value)
        return value

    def __repr__(self):
        return f"Compose({', '.join(map(repr, self.transforms))})"


def wrap_transform(transform: Callable, fn: Callable, transform_type: type | None = None) -> Callable:
    """`transform` with every part of the given type, or all of it, put through `fn`."""
    if transform_type is None or isinstance(transform, transform_type):
        return fn(transform)
    if hasattr(transform, "transforms"):
        return type(transform)([wrap_transform(part, fn, transform_type) for part in transform.transforms])
    return transform
