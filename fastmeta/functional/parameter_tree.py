"""Parameters in a pytree, those of them that adapt, and their rates of learning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta import values

from . import checks


class ParameterTree:
    """The tensors of a pytree that adapt, each once, and the way back into the tree."""

    def __init__(self, params: Any):
        with_paths, self.structure = pytree.tree_flatten_with_path(params)
        self.names = ["params" + pytree.keystr(path) for path, _ in with_paths]
        self.leaves = [leaf for _, leaf in with_paths]
        self.tensors: list[Tensor] = []
        self.places: list[int | None] = []  # of each leaf in `tensors`
        seen: dict[int, int] = {}
        for leaf in self.leaves:
            adapts = isinstance(leaf, Tensor) and leaf.requires_grad and leaf.is_floating_point()
            if adapts and id(leaf) not in seen:
                seen[id(leaf)] = len(self.tensors)
                self.tensors.append(leaf)
            self.places.append(seen[id(leaf)] if adapts else None)
        if not self.tensors:
            raise ValueError(
                "params must hold a floating tensor that requires a gradient, as dict(model.named_parameters()) does; "
                f"got {type(params).__name__}" + (" of tensors that require none" if self._floating() else "")
            )

    def tree(self, values: list[Tensor], *, rest: bool = True) -> Any:
        """The tree with `values` where tensors adapt, and with what else was there or None."""
        pairs = zip(self.places, self.leaves, strict=True)
        leaves = [(leaf if rest else None) if place is None else values[place] for place, leaf in pairs]
        return pytree.tree_unflatten(leaves, self.structure)

    def _floating(self) -> bool:
        return any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in self.leaves)


def rates_of_steps(lr: Any, steps: int, adapting: ParameterTree) -> list[list[float | Tensor]]:
    """For each step a rate for each tensor that adapts, in the graph of `lr`."""
    structure = adapting.structure
    of_step = isinstance(lr, Tensor) and lr.numel() != 1 and lr.shape == (steps,)
    whole = isinstance(lr, (int, float, Tensor)) and (of_step or not structure.is_leaf())
    if isinstance(lr, str) or lr is None:
        raise ValueError(f"lr must be a float, a tensor, or have the structure of params, got {values.shown(lr)}")
    if not whole and pytree.tree_structure(lr) != structure:
        raise ValueError(
            f"lr must be a float, a tensor, or have the structure of params, {structure}; got "
            f"{pytree.tree_structure(lr)}"
        )
    if whole and isinstance(lr, Tensor) and lr.numel() != 1 and not of_step:
        raise ValueError(
            f"lr as one tensor must have one element or shape [K] = [{steps}], got {list(lr.shape)}; for a rate per "
            "parameter give it the structure of params"
        )
    if of_step and structure.is_leaf() and _broadcasts(lr.shape, adapting.tensors[0].shape):
        raise ValueError(
            f"lr of shape [{steps}] may be a rate per step or per element of params {list(adapting.tensors[0].shape)}: "
            "put both in a list if it is per element, or only params if it is per step"
        )
    of_leaves = [lr] * len(adapting.leaves) if whole else pytree.tree_leaves(lr)
    of_tensors: list[list[float | Tensor]] = []
    given: list = []
    for name, place, rate in zip(adapting.names, adapting.places, of_leaves, strict=True):
        if place is None:
            continue
        if place < len(given):  # a tensor that has been there
            if rate is not given[place] and (isinstance(rate, Tensor) or rate != given[place]):
                raise ValueError(f"lr must be the same wherever params hold the same tensor; another is that of {name}")
            continue
        given.append(rate)
        of_tensors.append(_rate_of_steps(name, rate, adapting.tensors[place], steps, per_step=whole))
    return [[rates[step] for rates in of_tensors] for step in range(steps)]


def _rate_of_steps(name: str, rate: Any, weight: Tensor, steps: int, *, per_step: bool) -> list[float | Tensor]:
    """`per_step`: a tensor with several elements holds one for each step."""
    if isinstance(rate, (int, float)) and not isinstance(rate, bool):
        return [values.number("lr", rate)] * steps
    if not isinstance(rate, Tensor):
        raise TypeError(f"lr must be or hold floats or tensors, got {type(rate).__name__} for {name}")
    checks.tensor_of_any_shape("lr", rate)
    if rate.numel() == 1:
        return [rate.reshape(()).to(weight)] * steps
    if per_step or rate.dim() == weight.dim() + 1 and rate.shape[0] in (1, steps):
        of_steps = rate if per_step else rate.expand(steps, *rate.shape[1:])
        if per_step or _broadcasts(rate.shape[1:], weight.shape):
            return list(of_steps.to(weight).unbind())
    if _broadcasts(rate.shape, weight.shape):
        return [rate.to(weight)] * steps
    raise ValueError(
        f"lr for {name} must have one element, broadcast against its shape {list(weight.shape)}, or have one dimension "
        f"more, the first for the K = {steps} steps; got {list(rate.shape)}"
    )


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def lr_gradient(lr: Any, rate_gradients: list[tuple[Tensor, Tensor]]) -> Any:
    """From the rates of steps and parameters back to what they were taken from."""
    leaves, structure = pytree.tree_flatten(lr)
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    found: Iterable[Tensor] = ()
    if rate_gradients:
        rates, gradients = zip(*rate_gradients, strict=True)
        found = torch.autograd.grad(rates, wanted, grad_outputs=gradients, materialize_grads=True)
    elif wanted:  # no step
        found = map(torch.zeros_like, wanted)
    of_leaves = iter(found)
    return pytree.tree_unflatten(
        [next(of_leaves) if isinstance(leaf, Tensor) and leaf.requires_grad else None for leaf in leaves], structure
    )
