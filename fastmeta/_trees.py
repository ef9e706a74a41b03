"""Inputs, targets and predictions of several tensors.

A *tree* is a tensor, or a tuple, list, dict, named tuple, dataclass or type known to `torch.utils._pytree` that holds
trees. Its tensors are its leaves; None, numbers and text stand beside them and are carried along.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_BESIDE = (type(None), bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device)


class _Leaf:
    """Where a tensor stands in a structure."""


_LEAF = _Leaf()


def tree_map(function: Callable[[Any], Any], tree: Any, name: str = "it") -> Any:
    """The tree with `function` of every tensor; `name` is what errors call it."""
    return function(tree) if isinstance(tree, Tensor) else _walk(function, tree, name)


def flatten(tree: Any, name: str = "it") -> tuple[list[Tensor], Any]:
    """The tensors, and the structure that `unflatten` puts others into."""
    if isinstance(tree, Tensor):
        return [tree], _LEAF
    leaves: list[Tensor] = []

    def take(leaf: Tensor) -> _Leaf:
        leaves.append(leaf)
        return _LEAF

    return leaves, _walk(take, tree, name)


def unflatten(structure: Any, leaves: Sequence[Tensor]) -> Any:
    if structure is _LEAF:
        return leaves[0]
    left = iter(leaves)
    return _walk(lambda _: next(left), structure, "it")


def named_leaves(tree: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with what reaches it, such as `x['mask']`."""
    return ((where, leaf) for where, leaf in _entries(tree, name) if isinstance(leaf, Tensor))


def kind(tree: Any) -> tuple:
    """What tells trees apart whose tensors differ in their numbers and their first sizes alone, to look them up by."""
    return tuple(
        (where, leaf.shape[1:], leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (where, leaf)
        for where, leaf in _entries(tree, "")
    )


def first(tree: Any) -> Tensor:
    """The first tensor."""
    return tree if isinstance(tree, Tensor) else next(iter(flatten(tree)[0]))


def requires_grad(tree: Any) -> bool:
    return tree.requires_grad if isinstance(tree, Tensor) else any(leaf.requires_grad for leaf in flatten(tree)[0])


def split(tree: Any, size: int) -> list[Any]:
    """So many tasks at a time, as `Tensor.split`."""
    if isinstance(tree, Tensor):
        return list(tree.split(size))
    return [tree_map(lambda leaf, i=i: leaf[i : i + size], tree) for i in range(0, len(first(tree)), size)]


def unbind(tree: Any) -> list[Any]:
    """Task by task, as `Tensor.unbind`."""
    if isinstance(tree, Tensor):
        return list(tree)
    return [tree_map(lambda leaf, task=task: leaf[task], tree) for task in range(len(first(tree)))]


def cat(trees: Sequence[Any], dim: int, name: str = "they") -> Any:
    """The trees' tensors joined one by one; ValueError unless all else is alike."""
    if isinstance(trees[0], Tensor):
        return torch.cat(list(trees), dim)
    found = [flatten(tree, name) for tree in trees]
    structure = found[0][1]
    if any(kind(other) != kind(structure) for _, other in found[1:]):
        raise ValueError(f"{name} must be alike but for the numbers in their tensors")
    return unflatten(structure, [torch.cat(parts, dim) for parts in zip(*(leaves for leaves, _ in found), strict=True)])


def arguments(x: Any, **beside: Any) -> tuple[tuple, dict[str, Any]]:
    """How a module is called with one task's input: a tuple or list is its positional arguments and a dict its keyword
    arguments; anything else, named tuples and dataclasses too, is its one argument. What is `beside` comes last, or by
    its name where the input is a dict."""
    if isinstance(x, Mapping):
        return (), {**x, **beside}
    if isinstance(x, (tuple, list)) and not hasattr(x, "_fields"):
        return (*x, *beside.values()), {}
    return (x, *beside.values()), {}


def described(tree: Any) -> str:
    """For messages: what it is, and what is in it."""
    inside = ", ".join(f"{where} {list(leaf.shape)}" for where, leaf in named_leaves(tree, ""))
    return f"a {type(tree).__name__} ({inside})"


class Outputs:
    """The structure of what a function returns for one task, taken off inside a transform, put back outside of it."""

    def __init__(self):
        self.structure: Any = None

    def taken(self, output: Any) -> list[Tensor]:
        leaves, structure = flatten(output, "the model's output")
        if not leaves:
            raise ValueError(f"the model must return tensors, got {type(output).__name__}")
        if self.structure is not None and structure is not self.structure and kind(structure) != kind(self.structure):
            raise ValueError("the model's output must be alike for all tasks but for the numbers in its tensors")
        self.structure = structure
        return leaves

    def put_back(self, leaves: Sequence[Tensor]) -> Any:
        return unflatten(self.structure, leaves)


def _walk(function: Callable, node: Any, name: str) -> Any:
    if isinstance(node, (Tensor, _Leaf)):
        return function(node)
    if isinstance(node, _BESIDE):
        return node
    parts, made = _parts(node, name)
    return made([_walk(function, part, where) for where, part in parts])


def _entries(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Tensors, and what stands beside them."""
    if isinstance(node, (Tensor, _Leaf, *_BESIDE)):
        yield name, node
        return
    for where, part in _parts(node, name)[0]:
        yield from _entries(part, where)


def _parts(node: Any, name: str) -> tuple[list[tuple[str, Any]], Callable[[list], Any]]:
    """What a container holds, each with what reaches it, and the function that makes one like it of other parts."""
    if isinstance(node, Mapping):  # before dataclasses: some are both, and hold what they hold as a mapping
        keys = list(node)
        return [(f"{name}[{k!r}]", node[k]) for k in keys], lambda p: _mapping(node, dict(zip(keys, p, strict=True)))
    if isinstance(node, (tuple, list)):
        names = getattr(node, "_fields", None)
        reached = [f"{name}[{i}]" for i in range(len(node))] if names is None else [f"{name}.{n}" for n in names]
        return list(zip(reached, node, strict=False)), getattr(node, "_make", type(node))
    if is_dataclass(node) and not isinstance(node, type):
        keys = [field.name for field in fields(node) if hasattr(node, field.name)]
        return [(f"{name}.{k}", getattr(node, k)) for k in keys], lambda p: _dataclass(node, zip(keys, p, strict=True))
    registered = pytree.SUPPORTED_NODES.get(type(node))
    if registered is None:
        advice = ": give torch.as_tensor of it" if hasattr(node, "__array__") else ""
        raise TypeError(
            f"{name} is a {type(node).__name__}, which cannot be told apart by task{advice}; tensors can, beside None, "
            "numbers and text, in tuples, lists, dicts, dataclasses and what is registered with torch.utils._pytree"
        )
    parts, context = registered.flatten_fn(node)
    return [(f"{name}[{i}]", part) for i, part in enumerate(parts)], lambda p: registered.unflatten_fn(p, context)


def _mapping(like: Mapping, parts: dict) -> Mapping:
    if type(like) is dict or not isinstance(like, MutableMapping):
        return parts
    new = copy.copy(like)
    for key, part in parts.items():
        new[key] = part
    return new


def _dataclass(like: Any, parts: Iterator[tuple[str, Any]]) -> Any:
    new = copy.copy(like)
    for key, part in parts:
        object.__setattr__(new, key, part)  # frozen ones too
    return new
