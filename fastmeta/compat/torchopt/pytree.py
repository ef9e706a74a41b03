"""`torchopt.pytree`: trees of tensors. None is no leaf and stays where it is, unless `none_is_leaf`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from fastmeta.compat._absent import not_here


def tree_map(func: Callable, tree: Any, *rests: Any, none_is_leaf: bool = False) -> Any:
    """`func` of the leaves of trees of one structure."""

    def of_leaf(leaf: Any, *others: Any) -> Any:
        return None if leaf is None and not none_is_leaf else func(leaf, *others)

    if _is_flat(tree):  # as all trees are in an optimiser: pytree takes longer than the arithmetic of small tensors
        return type(tree)([of_leaf(*leaves) for leaves in zip(tree, *rests, strict=True)])
    return _pytree.tree_map(of_leaf, tree, *rests)


def _is_flat(tree: Any) -> bool:
    return type(tree) in (list, tuple) and all(leaf is None or isinstance(leaf, Tensor) for leaf in tree)


def tree_map_(func: Callable, tree: Any, *rests: Any, none_is_leaf: bool = False) -> Any:
    """Calls `func` with the leaves, and gives back the first tree itself."""
    tree_map(func, tree, *rests, none_is_leaf=none_is_leaf)
    return tree


class PyTreeSpec:
    """The structure of a tree, and which of its leaves are None."""

    def __init__(self, spec: _pytree.TreeSpec, nones: tuple[int, ...]):
        self.spec, self.nones = spec, nones

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PyTreeSpec) and (self.spec, self.nones) == (other.spec, other.nones)

    def __hash__(self) -> int:
        return hash(self.nones)

    @property
    def num_leaves(self) -> int:
        return self.spec.num_leaves - len(self.nones)


def tree_flatten(tree: Any, *, none_is_leaf: bool = False) -> tuple[list, PyTreeSpec]:
    """The leaves, and the structure."""
    leaves, spec = _pytree.tree_flatten(tree)
    nones = () if none_is_leaf else tuple(i for i, leaf in enumerate(leaves) if leaf is None)
    return [leaf for i, leaf in enumerate(leaves) if i not in nones], PyTreeSpec(spec, nones)


def tree_flatten_as_tuple(tree: Any, *, none_is_leaf: bool = False) -> tuple[tuple, PyTreeSpec]:
    leaves, spec = tree_flatten(tree, none_is_leaf=none_is_leaf)
    return tuple(leaves), spec


def tree_unflatten(treespec: PyTreeSpec, leaves: Iterable) -> Any:
    """The tree of that structure."""
    leaves = list(leaves)
    for i in treespec.nones:
        leaves.insert(i, None)
    return _pytree.tree_unflatten(leaves, treespec.spec)


def tree_leaves(tree: Any, *, none_is_leaf: bool = False) -> list:
    return tree_flatten(tree, none_is_leaf=none_is_leaf)[0]


def tree_structure(tree: Any, *, none_is_leaf: bool = False) -> PyTreeSpec:
    return tree_flatten(tree, none_is_leaf=none_is_leaf)[1]


def tree_vdot_real(tree_x: Any, tree_y: Any) -> float:
    """The inner product of two trees of real tensors, as a number."""
    pairs = zip(tree_leaves(tree_x), tree_leaves(tree_y), strict=True)
    return sum(torch.dot(x.reshape(-1), y.reshape(-1)).item() for x, y in pairs)


def tree_add_scaled(tree_x: Any, tree_y: Any, alpha: float | Tensor = 1.0) -> Any:
    """`x + alpha * y`."""
    return tree_map(lambda x, y: x + alpha * y, tree_x, tree_y)


__getattr__ = not_here(
    __name__,
    "TorchOpt 0.7.3",
    ("PyTree", "tree_add", "tree_add_scalar_mul", "tree_all", "tree_any", "tree_as_rref", "tree_local_value",
     "tree_matmul", "tree_mul", "tree_neg", "tree_pos", "tree_reduce", "tree_replace_nones", "tree_scalar_mul",
     "tree_sub", "tree_sub_scalar_mul", "tree_to_here", "tree_transpose", "tree_truediv", "tree_wait"),
    "It is in the package optree, or in torch.utils._pytree.",
)  # fmt: skip
