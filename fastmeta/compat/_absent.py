"""What a name says that the library has and its stand-in has not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NoReturn


def not_here(module: str, library: str, names: Iterable[str], instead: str = "") -> Callable[[str], NoReturn]:
    """A module's `__getattr__`: `ImportError` for the library's own `names`, `AttributeError` for any other.

    It is an ImportError because `from module import name` would swallow the sentence of an AttributeError.

    Args:
        module: `__name__` of the module.
        library: the library and its version.
        names: what the library has there, and this module has not.
        instead: a sentence that says what to use, put behind.
    """
    known = frozenset(names)

    def __getattr__(name: str) -> NoReturn:
        if name in known:
            raise ImportError(f"{library} has {name}, but {module} has not. {instead}".strip(), name=name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__
