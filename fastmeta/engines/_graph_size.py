"""How large a graph over the inner steps would be, to know when to do without one."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastmeta._trees import arguments, first, kind, tree_map

from ..functional.run_again import call_with
from ._base import InnerLoop
from ._replica import replica

# Bytes from which the steps are swept. Below, memory is no matter, and running every step once more may be
LARGE = 64 * 2**20
_known: WeakKeyDictionary[nn.Module, dict[tuple, int]] = WeakKeyDictionary()


def graph_size(model: nn.Module, inner: InnerLoop, x: Tensor) -> int | None:
    """Bytes of activations that a graph over all inner steps keeps for support rows `x` `[T, S, ...]`; None where the
    model does not run on these. Of the second derivatives, which keep two to three times that, there is no count."""
    found, key = _known.setdefault(model, {}), kind(tree_map(lambda leaf: leaf.flatten(0, 1), x))
    tasks, rows = first(x).shape[:2]
    if key not in found:
        task = tree_map(lambda leaf: leaf[0], x)
        try:
            found[key] = _saved(model, task) // rows
        except Exception:  # what is wrong, the engine that runs says in its own words
            return None
    return found[key] * rows * tasks * inner.steps


def _saved(model: nn.Module, x: Tensor) -> int:
    """Bytes that a graph of one forward pass keeps, beside what is there anyway."""
    copy = replica(model)
    known = {t.untyped_storage().data_ptr() for t in (*copy.parameters(), *copy.buffers())}
    tree_map(lambda leaf: known.add(leaf.untyped_storage().data_ptr()), x)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = first(x).device
    # random layers must not find other numbers because of this
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = call_with(copy, dict(copy.named_parameters()), *arguments(x))
    del found  # until here, so that no memory was used twice
    return sum(kept.values())
