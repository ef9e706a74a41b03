"""`torchopt.base`: transformations of gradients, and chains of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class EmptyState(NamedTuple):
    """The state of what remembers nothing."""


class UninitializedState(NamedTuple):
    """The state of an optimiser before its first step."""


class GradientTransformation(NamedTuple):
    """`init(params) -> state` and `update(updates, state, *, params=None, inplace=True) -> (updates, state)`."""

    init: Callable[..., Any]
    update: Callable[..., Any]

    def chain(self, next: GradientTransformation) -> ChainedGradientTransformation:
        """This one, then `next`."""
        return ChainedGradientTransformation(self, next)


class IdentityGradientTransformation(GradientTransformation):
    """Changes nothing."""

    def __new__(cls):
        return super().__new__(cls, cls.init_fn, cls.update_fn)

    @staticmethod
    def init_fn(params: Any) -> EmptyState:
        return EmptyState()

    @staticmethod
    def update_fn(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        return updates, state

    def __reduce__(self) -> tuple:
        return IdentityGradientTransformation, ()


class ChainedGradientTransformation(GradientTransformation):
    """One after the other; chains in it are opened, and what changes nothing is left out. The state is a tuple."""

    transformations: tuple[GradientTransformation, ...]

    def __new__(cls, *transformations: GradientTransformation):
        parts: list[GradientTransformation] = []
        for t in transformations:
            if isinstance(t, ChainedGradientTransformation):
                parts += t.transformations
            elif not isinstance(t, IdentityGradientTransformation):
                parts.append(t)
        parts = parts or [IdentityGradientTransformation()]

        def init_fn(params: Any) -> tuple:
            return tuple(part.init(params) for part in parts)

        def update_fn(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, tuple]:
            if len(parts) != len(state):
                raise ValueError("The number of updates and states has to be the same in chain: was init called?")
            states = []
            for part, old in zip(parts, state, strict=True):
                updates, new = part.update(updates, old, params=params, inplace=inplace)
                states.append(new)
            return updates, tuple(states)

        self = super().__new__(cls, init_fn, update_fn)
        self.transformations = tuple(parts)
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.transformations))})"

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ChainedGradientTransformation):
            return self.transformations == other.transformations
        return isinstance(other, GradientTransformation) and self.transformations == (other,)

    def __hash__(self) -> int:
        return hash(self.transformations)

    def __reduce__(self) -> tuple:
        return ChainedGradientTransformation, self.transformations


def identity() -> IdentityGradientTransformation:
    """The transformation that changes nothing."""
    return IdentityGradientTransformation()
