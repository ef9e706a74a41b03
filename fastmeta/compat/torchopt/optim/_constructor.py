"""What the classes of optimisers share: their constructors are those of the functions of `torchopt.alias`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def constructor(base: type, target: str, make: Callable, without: tuple[str, ...] = (), **defaults: Any) -> Callable:
    """`__init__(self, <target>, ...)` of a subclass of `base`, for steps of `make(...)`.

    Its other arguments are those of `make` but for the ones it goes `without`, and have its defaults but for these.
    """
    place = inspect.Parameter.POSITIONAL_OR_KEYWORD
    first = [inspect.Parameter(name, place) for name in ("self", target)]
    options = [
        option.replace(default=defaults.get(option.name, option.default))
        for option in inspect.signature(make).parameters.values()
        if option.name not in without
    ]
    signature = inspect.Signature([*first, *options])

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        _, stepped, *_ = given.arguments.values()
        base.__init__(self, stepped, make(**{option.name: given.arguments[option.name] for option in options}))

    __init__.__signature__ = signature
    return __init__
