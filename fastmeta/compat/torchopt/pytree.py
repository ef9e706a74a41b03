"""`torchopt.pytree`: trees of tensors, by torch's own pytrees. None is no leaf and stays where it is, unless
`none_is_leaf`; dicts keep the order that they have."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import rpc
from torch.utils import _pytree

from fastmeta.compat._absent import not_here

PyTree = Any
IsLeaf = Callable[[Any], bool] | None


def tree_map(
    func: Callable, tree: Any, *rests: Any, is_leaf: IsLeaf = None, none_is_leaf: bool = False, namespace: str = ""
) -> Any:
    """`func` of the leaves of trees of one structure. `namespace` is optree's, and changes nothing."""

    def of_leaf(leaf: Any, *others: Any) -> Any:
        return None if leaf is None and not none_is_leaf else func(leaf, *others)

    if is_leaf is None and _is_flat(tree):  # as in optimisers: pytree takes longer than arithmetic of small tensors
        return type(tree)([of_leaf(*leaves) for leaves in zip(tree, *rests, strict=True)])
    return _pytree.tree_map(of_leaf, tree, *rests, is_leaf=is_leaf)


def _is_flat(tree: Any) -> bool:
    return type(tree) in (list, tuple) and all(leaf is None or isinstance(leaf, Tensor) for leaf in tree)


def tree_map_(func: Callable, tree: Any, *rests: Any, **options: Any) -> Any:
    """Calls `func` with the leaves, and gives back the first tree itself. Options as those of `tree_map`."""
    tree_map(func, tree, *rests, **options)
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

    def unflatten(self, leaves: Iterable) -> Any:
        return tree_unflatten(self, leaves)

    def flatten_up_to(self, tree: Any) -> list:
        """What stands in `tree` where this structure has leaves."""
        return [leaf for i, leaf in enumerate(self.spec.flatten_up_to(tree)) if i not in self.nones]


def tree_flatten(
    tree: Any, is_leaf: IsLeaf = None, *, none_is_leaf: bool = False, namespace: str = ""
) -> tuple[list, PyTreeSpec]:
    """The leaves, and the structure."""
    leaves, spec = _pytree.tree_flatten(tree, is_leaf=is_leaf)
    nones = () if none_is_leaf else tuple(i for i, leaf in enumerate(leaves) if leaf is None)
    return [leaf for i, leaf in enumerate(leaves) if i not in nones], PyTreeSpec(spec, nones)


def tree_flatten_as_tuple(tree: Any, is_leaf: IsLeaf = None, **options: Any) -> tuple[tuple, PyTreeSpec]:
    """`tree_flatten`, with the leaves in a tuple."""
    leaves, spec = tree_flatten(tree, is_leaf, **options)
    return tuple(leaves), spec


def tree_unflatten(treespec: PyTreeSpec, leaves: Iterable) -> Any:
    """The tree of that structure."""
    leaves = list(leaves)
    for i in treespec.nones:
        leaves.insert(i, None)
    return _pytree.tree_unflatten(leaves, treespec.spec)


def tree_leaves(tree: Any, is_leaf: IsLeaf = None, **options: Any) -> list:
    return tree_flatten(tree, is_leaf, **options)[0]


def tree_structure(tree: Any, is_leaf: IsLeaf = None, **options: Any) -> PyTreeSpec:
    return tree_flatten(tree, is_leaf, **options)[1]


def tree_reduce(func: Callable, tree: Any, *initial: Any, is_leaf: IsLeaf = None, **options: Any) -> Any:
    """`func` of the leaves, two at a time from the left."""
    return functools.reduce(func, tree_leaves(tree, is_leaf, **options), *initial)


def tree_all(tree: Any, is_leaf: IsLeaf = None, **options: Any) -> bool:
    return all(tree_leaves(tree, is_leaf, **options))


def tree_any(tree: Any, is_leaf: IsLeaf = None, **options: Any) -> bool:
    return any(tree_leaves(tree, is_leaf, **options))


def tree_pos(tree: Any) -> Any:
    return tree_map(operator.pos, tree)


def tree_neg(tree: Any) -> Any:
    return tree_map(operator.neg, tree)


def tree_add(*trees: Any) -> Any:
    """The sums of the leaves."""
    return tree_map(lambda *leaves: functools.reduce(operator.add, leaves), *trees)


def tree_sub(minuend_tree: Any, subtrahend_tree: Any) -> Any:
    return tree_map(operator.sub, minuend_tree, subtrahend_tree)


def tree_mul(*trees: Any) -> Any:
    """The products of the leaves."""
    return tree_map(lambda *leaves: functools.reduce(operator.mul, leaves), *trees)


def tree_matmul(*trees: Any) -> Any:
    """The matrix products of the leaves."""
    return tree_map(lambda *leaves: functools.reduce(operator.matmul, leaves), *trees)


def tree_truediv(dividend_tree: Any, divisor_tree: Any) -> Any:
    return tree_map(operator.truediv, dividend_tree, divisor_tree)


def tree_scalar_mul(scalar: float | Tensor, multiplicand_tree: Any) -> Any:
    return tree_map(lambda x: scalar * x, multiplicand_tree)


def tree_add_scalar_mul(tree_x: Any, tree_y: Any, alpha: float | Tensor | None = None) -> Any:
    """`x + alpha * y`, and `x + y` by default."""
    return tree_map(lambda x, y: x + (y if alpha is None else alpha * y), tree_x, tree_y)


def tree_sub_scalar_mul(tree_x: Any, tree_y: Any, alpha: float | Tensor | None = None) -> Any:
    """`x - alpha * y`, and `x - y` by default."""
    return tree_map(lambda x, y: x - (y if alpha is None else alpha * y), tree_x, tree_y)


def tree_vdot_real(tree_x: Any, tree_y: Any) -> float:
    """The real part of the inner product of two trees of tensors, as a number."""
    leaves, structure = tree_flatten(tree_x)
    pairs = zip(leaves, structure.flatten_up_to(tree_y), strict=True)
    return sum(_dot_real(x.reshape(-1), y.reshape(-1)) for x, y in pairs)


def _dot_real(x: Tensor, y: Tensor) -> float:
    real = torch.dot(x.real, y.real).item()
    return real + torch.dot(x.imag, y.imag).item() if x.is_complex() and y.is_complex() else real


def tree_wait(future_tree: Any) -> Any:
    """The results of a tree of futures."""
    futures, structure = tree_flatten(future_tree)
    return tree_unflatten(structure, torch.futures.wait_all(futures))


if rpc.is_available():

    def tree_as_rref(tree: Any) -> Any:
        """A reference for other workers to each leaf."""
        return tree_map(rpc.RRef, tree)

    def tree_to_here(rref_tree: Any, timeout: float = -1.0) -> Any:
        """The values of references, wherever they are; `timeout` in seconds, that of RPC by default."""
        return tree_map(lambda ref: ref.to_here(timeout=timeout), rref_tree)

    def tree_local_value(rref_tree: Any) -> Any:
        """The values of references to what this worker owns."""
        return tree_map(lambda ref: ref.local_value(), rref_tree)


__getattr__ = not_here(
    __name__,
    "TorchOpt 0.7.3",
    ("register_pytree_node", "tree_broadcast_prefix", "tree_iter", "tree_map_with_path", "tree_max", "tree_min",
     "tree_paths", "tree_replace_nones", "tree_sum", "tree_transpose", "tree_transpose_map"),
    "It is in the package optree, or in torch.utils._pytree.",
)  # fmt: skip
