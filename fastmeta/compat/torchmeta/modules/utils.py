"""`get_subdict` as a function, which code written for torchmeta before 1.5 calls."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor


def under(params: Mapping[str, Tensor], key: str) -> OrderedDict[str, Tensor]:
    """The entries whose name begins with `key.`, under what follows it, in their order."""
    prefix = f"{key}."
    size = len(prefix)
    return OrderedDict(
        (name[size:], value) for name, value in params.items() if name.startswith(prefix) and len(name) > size
    )


def get_subdict(dictionary: Mapping[str, Tensor] | None, key: str | None = None) -> Mapping[str, Tensor] | None:
    """The parameters of the submodule `key`, named as the submodule names them.

    None gives None, and no key or an empty one the dict itself. Names may have the prefix `module.` of `DataParallel`.
    Without a match the result is empty; the method of `MetaModule` warns instead and gives None.
    """
    if dictionary is None or not key:
        return dictionary
    return under(dictionary, key) or under(dictionary, f"module.{key}")
