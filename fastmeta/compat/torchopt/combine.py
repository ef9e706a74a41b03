"""`torchopt.combine`: transformations one after the other."""

from __future__ import annotations

from typing import Any

from . import pytree
from .base import ChainedGradientTransformation, GradientTransformation, identity


def chain(*transformations: GradientTransformation) -> GradientTransformation:
    """Applies them in this order."""
    if len(transformations) == 1:
        return transformations[0]
    return ChainedGradientTransformation(*transformations) if transformations else identity()


def chain_flat(*transformations: GradientTransformation) -> GradientTransformation:
    """The same on the list of all leaves, None among them, in place of the tree."""
    if not transformations:
        return identity()
    inner = chain(*transformations)

    def init_fn(params: Any) -> Any:
        return inner.init(pytree.tree_leaves(params, none_is_leaf=True))

    def update_fn(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        leaves, structure = pytree.tree_flatten(updates, none_is_leaf=True)
        params = None if params is None else pytree.tree_leaves(params, none_is_leaf=True)
        leaves, state = inner.update(leaves, state, params=params, inplace=inplace)
        return pytree.tree_unflatten(structure, leaves), state

    return GradientTransformation(init_fn, update_fn)


chain.flat = chain_flat
