"""What a name says that the library has and its stand-in has not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
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


def data_not_here(module: str, library: str, names: Iterable[str], instead: str = "") -> Callable[[str], type]:
    """As `not_here`, for data sets: client code imports more of them than it uses, so these names can be imported, and
    raise their ImportError when they are called."""
    refuse = not_here(module, library, names, instead)
    known = frozenset(names)

    @cache
    def __getattr__(name: str) -> type:
        if name not in known:
            refuse(name)

        def __new__(cls, *args, **kwargs):
            refuse(name)

        return type(name, (), {"__new__": __new__, "__module__": module})

    return __getattr__
