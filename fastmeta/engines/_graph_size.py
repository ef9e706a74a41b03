"""How large graphs would be, to know when to do without one."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastmeta._trees import arguments, first, kind, tree_map

from ..functional.run_again import call_with
from ._base import InnerLoop
from ._replica import replica

# Bytes from which a graph over the steps is avoided. Below, memory is no matter, and running every step once more is
# (of Conv4-64, five steps on five shots, a quarter more time)
OF_STEPS = 2**29
# Bytes of one pass's graph from which a sweep, which is there to save memory, takes some tasks after the other
LARGE = 64 * 2**20
ON_GPU = 2**30  # of both: many rows at once are what a GPU needs
# A graph over the steps is not large beside that of the query rows, which is there in any case
OF_QUERIES = 1.0
SAMPLE = 8  # rows that tell what a row takes: all of a task's would need the memory that is to be saved
_known: WeakKeyDictionary[nn.Module, dict[tuple, int]] = WeakKeyDictionary()


def is_large(model: nn.Module, inner: InnerLoop, support_x: Tensor, query_x: Tensor) -> bool:
    """Whether the activations that a graph over all inner steps keeps for support rows `[T, S, ...]` are many bytes,
    and more than those of the query rows `[T, Q, ...]`. Of the second derivatives, which keep two to three times that,
    there is no count."""
    size = of_row(model, support_x)
    if size is None:
        return False
    (tasks, rows), queries = first(support_x).shape[:2], first(query_x).shape[1]
    graph = size * rows * inner.steps
    return tasks * graph >= _limit(support_x, OF_STEPS) and graph > OF_QUERIES * size * queries


def tasks_at_once(model: nn.Module, x: Tensor) -> int:
    """For how many tasks with rows `x` `[T, B, ...]` a graph of one pass is not large; at least one."""
    size = of_row(model, x)
    tasks, rows = first(x).shape[:2]
    if not size or not rows:
        return tasks
    return max(1, min(tasks, _limit(x, LARGE) // (size * rows)))


def _limit(x: Tensor, on_cpu: int) -> int:
    return ON_GPU if first(x).is_cuda else on_cpu


def of_row(model: nn.Module, x: Tensor) -> int | None:
    """Bytes of activations that a graph keeps for a row of `x` `[T, B, ...]`; None where the model does not run."""
    found, key = _known.setdefault(model, {}), kind(tree_map(lambda leaf: leaf.flatten(0, 1), x))
    if key not in found:
        few = tree_map(lambda leaf: leaf[0, :SAMPLE], x)
        try:
            found[key] = _saved(model, few) // len(first(few))
        except Exception:  # what is wrong, the engine that runs says in its own words
            return None
    return found[key]


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
