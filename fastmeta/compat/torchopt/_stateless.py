"""A module with other tensors in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

MISSING: Any = object()


def swap_state(
    module: nn.Module, named_tensors: dict[str, Tensor] | Iterable[tuple[str, Tensor]], allow_missing: bool = False
) -> dict[str, Tensor]:
    """Puts tensors in the place of those of the same names, and gives back what was there."""

    def swapped(path: str, value: Tensor) -> Tensor:
        *parts, name = path.split(".")
        owner = module
        for part in parts:
            owner = getattr(owner, part)
        old = getattr(owner, name, MISSING) if allow_missing else getattr(owner, name)
        places = (getattr(owner, kind, {}) for kind in ("_parameters", "_buffers", "_meta_parameters"))
        home = next((place for place in places if name in place), None)
        if value is MISSING:
            delattr(owner, name)
        elif home is not None:
            home[name] = value
        else:
            setattr(owner, name, value)
        return old

    return {path: swapped(path, value) for path, value in dict(named_tensors).items()}


@contextlib.contextmanager
def reparametrize(
    module: nn.Module, named_tensors: dict[str, Tensor] | Iterable[tuple[str, Tensor]], allow_missing: bool = False
) -> Iterator[nn.Module]:
    """The module with these tensors, until the end of the block."""
    old = swap_state(module, named_tensors, allow_missing)
    try:
        yield module
    finally:
        swap_state(module, old, allow_missing)


reparameterize = reparametrize
