"""Whether convolutions with weights of each task's own are faster mapped over the tasks or one task after the other.

Mapped, they are one grouped convolution, slower than as many plain ones; one after the other, every small call costs
what a call costs. Which weighs more is a question of how much there is in a call.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastmeta._trees import first, kind, tree_map
from fastmeta.dispatch import tuned

from ._base import InnerLoop
from .loop import LoopEngine

# Numbers in a largest activation of a task, the mean over its passes. By them a loop over mapping in time (AVX2, one
# thread): 12,000 4.6; 94,000 1.3 (4 tasks); 188,000 1.4; 235,000 1.0; 282,000 0.9; 564,000 0.8; 1.1 million 0.7.
_MOST = 256 * 1024
_CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
_known: WeakKeyDictionary[nn.Module, dict[tuple, int]] = WeakKeyDictionary()


def why_not_mapped(model: nn.Module, inner: InnerLoop, x: Tensor) -> str | None:
    """Why a loop over the tasks is expected to be faster for support rows `x` `[T, S, ...]`; None if it is not: without
    convolutions that adapt, or on a GPU."""
    layer = _adapting(model) if inner.steps and not first(x).is_cuda else None
    if layer is None:
        return None
    # a step is nine forward passes (two gradients, and those of theirs), the query rows are three
    passes = 9 * inner.steps + 3
    tasks, support = first(x).shape[:2]
    rows = (9 * inner.steps * support + 3 * inner.queries) / passes
    largest = _largest_output(model, x)
    if largest is not None and largest * rows < tuned.number("mapped", _MOST) * (1 - 1 / max(tasks, 1)):
        return None
    return f"layer {layer!r} is a convolution: at this size, with weights of each task's own, slower than a loop"


def _adapting(model: nn.Module) -> str | None:
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.conv._ConvNd) and any(p.requires_grad for p in layer.parameters()):
            return name
    return None


def _largest_output(model: nn.Module, x: Tensor) -> int | None:
    """Numbers in the largest output of a convolution for a row; None where the module does not run on these."""
    found = _known.setdefault(model, {})
    key = kind(x)
    if key not in found:
        watch = _Watch()
        try:
            with torch.no_grad(), torch.random.fork_rng([]), watch:  # random layers find the same numbers as before
                LoopEngine().predict(model, dict(model.named_parameters()), tree_map(lambda leaf: leaf[:1], x))
        except Exception:  # what is wrong, the engine that runs says in its own words
            return None
        found[key] = watch.largest // max(first(x).shape[1], 1)
    return found[key]


class _Watch(TorchFunctionMode):
    """Looks at what convolutions give; of this thread alone."""

    largest = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func in _CONVOLUTIONS:
            self.largest = max(self.largest, output.numel())
        return output
