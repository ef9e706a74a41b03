"""A whole meta-step as one CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import update_wrapper
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmeta import _trees, values

_MOST_KINDS = 8  # of inputs; every one has a graph with memory of its own


def capture(step: Callable[..., Any], *, warmup: int = 3) -> Callable[..., Any]:
    """A training step that on a GPU is recorded once, and from then on launched as a whole.

    A meta-step is hundreds of small kernels, and Python takes longer to launch one than it takes to run. `step` does
    all of it, forward, backward and optimiser:

        >>> @fastmeta.capture
        ... def step(batch):
        ...     optimizer.zero_grad()
        ...     loss = maml(batch).loss
        ...     loss.backward()
        ...     optimizer.step()
        ...     return loss

    For each kind of inputs (structure, shapes, dtypes, devices; with gradients on or off) the first `warmup` calls run
    as they are, on a stream of their own; the next is recorded, and it and all later ones replay the recording on
    copies of their inputs. Every call is one step: the parameters are those that as many plain calls give. On the CPU
    `step` runs as it is.

    What holds for every CUDA graph: Python runs no more. So the step must not ask for a number (`.item()`, printing,
    `if` on a tensor), use only tensors that stay where they are (parameters are updated in place; the optimiser needs
    `capturable=True` where it has that), and take what changes as an input or from a tensor that is written into: a
    learning rate that is a Python number stays as recorded, and so do `train()` and `eval()`. Labels are checked in the
    calls before the recording, not in replays. Tests run it on a stand-in for CUDA graphs: no GPU has seen it yet.

    Args:
        step: takes tensors, or tuples, lists, dicts, named tuples (a `TaskBatch`) of them, none of which requires a
            gradient, and returns such, or None.
        warmup: how many calls of a kind run before it is recorded, at least 1 (default 3): by then optimisers have
            their state and libraries have chosen their algorithms.

    Returns:
        A function of the same arguments, which returns what `step` returns, detached; what was recorded is copied, so
        that the next call does not write over it.

    Raises:
        TypeError: what is no function; inputs or outputs that hold something else than tensors.
        ValueError: inputs on several devices, or that require gradients.
        RuntimeError: a step that cannot be recorded, with the cause.
    """
    return Captured(values.function("step", step), values.count("warmup", warmup))


class _Recording(NamedTuple):
    graph: Any
    inputs: list[Tensor]
    outputs: list[Tensor]
    structure: Any


class Captured:
    """What `capture` returns: `recordings` holds one for each kind of inputs that has been met often enough."""

    def __init__(self, step: Callable[..., Any], warmup: int):
        self.step, self.warmup = step, warmup
        self.recordings: dict[tuple, _Recording] = {}
        self._seen: dict[tuple, int] = {}
        update_wrapper(self, step, updated=())

    def __call__(self, *args, **kwargs):
        given = (args, kwargs)
        leaves, structure = _trees.flatten(given, "step's arguments")
        for name, leaf in _trees.named_leaves(given, "step's arguments"):
            if leaf.requires_grad:
                raise ValueError(f"{name} requires a gradient: give x.detach(), or make it a parameter that step holds")
        devices = {leaf.device for leaf in leaves}
        if len(devices) > 1:
            raise ValueError(f"step's arguments must be on one device, got {', '.join(sorted(map(str, devices)))}")
        if not leaves or not _on_gpu(leaves[0]) or torch.compiler.is_compiling():
            return self._plainly(args, kwargs)
        key = (*_trees.kind(given), *(leaf.shape for leaf in leaves), torch.is_grad_enabled())
        recording = self.recordings.get(key)
        if recording is None:
            if self._still_warming_up(key):
                return self._on_side_stream(args, kwargs)
            recording = self.recordings[key] = self._record(leaves, structure)
        torch._foreach_copy_(recording.inputs, leaves)
        recording.graph.replay()
        return _trees.unflatten(recording.structure, [t.clone() for t in recording.outputs])

    def _plainly(self, args, kwargs):
        found, structure = _outputs(self.step(*args, **kwargs))
        return _trees.unflatten(structure, found)

    def _still_warming_up(self, key: tuple) -> bool:
        if len(self.recordings) >= _MOST_KINDS:
            if key not in self._seen:
                warnings.warn(
                    f"step has been recorded for {_MOST_KINDS} kinds of inputs; further ones run as they are. Batches "
                    "of equal sizes need one recording",
                    stacklevel=3,
                )
            self._seen[key] = 0
            return True
        self._seen[key] = self._seen.get(key, 0) + 1
        return self._seen[key] <= self.warmup

    def _on_side_stream(self, args, kwargs):
        """Where a recording will be made: what a library sets up for the stream it sets up now."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            found = self._plainly(args, kwargs)
        current.wait_stream(side)
        return found

    def _record(self, leaves: list[Tensor], structure: Any) -> _Recording:
        inputs = [leaf.clone() for leaf in leaves]
        args, kwargs = _trees.unflatten(structure, inputs)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                outputs, made = _outputs(self.step(*args, **kwargs))
        except RuntimeError as error:
            raise RuntimeError(
                f"step cannot be recorded as a CUDA graph: {str(error).splitlines()[0]}. While it is recorded nothing "
                "may wait for the GPU: no .item(), .tolist(), .cpu(), no `if` or print of a tensor, no masks or labels "
                "that decide how much is computed; and optimisers that have capturable= need it True. Without "
                "capture() the step runs as it is"
            ) from error
        return _Recording(graph, inputs, outputs, made)


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _outputs(found: Any) -> tuple[list[Tensor], Any]:
    leaves, structure = _trees.flatten(found, "what step returns")
    return [leaf.detach() for leaf in leaves], structure
