"""`torchopt.distributed.autograd`: gradients through calls on other workers, into local tensors."""

from __future__ import annotations

from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.distributed import autograd
from torch.distributed.autograd import context

__all__ = ["context", "is_available"]
_one_at_a_time = Lock()


def is_available() -> bool:
    """Whether this torch has distributed autograd."""
    return autograd.is_available()


if is_available():
    from torch.distributed.autograd import DistAutogradContext, get_gradients

    __all__ += ["DistAutogradContext", "backward", "get_gradients", "grad"]

    def backward(autograd_ctx_id: int, tensors: Any, retain_graph: bool = False, inputs: Any = None) -> None:
        """Adds the gradients of the sum of `tensors` to `.grad` of local leaves; only of `inputs` where they are given.

        Raises:
            RuntimeError: `inputs` that are none, or need no gradient.
        """
        chosen = None if inputs is None else _differentiable(inputs)
        if chosen == ():
            raise RuntimeError("'inputs' argument to backward() cannot be empty.")
        found = _gradients(autograd_ctx_id, tensors, retain_graph)
        with _one_at_a_time:
            for p, g in found.items():
                if chosen is None or any(p is c for c in chosen):
                    p.grad = g if p.grad is None else p.grad + g

    def grad(
        autograd_ctx_id: int, outputs: Any, inputs: Any, retain_graph: bool = False, allow_unused: bool = False
    ) -> tuple[Tensor | None, ...]:
        """The gradients of the sum of `outputs` with respect to local `inputs`.

        Raises:
            RuntimeError: an input that needs no gradient, or, but for `allow_unused`, that was not used.
        """
        chosen = _differentiable(inputs)
        found = _gradients(autograd_ctx_id, outputs, retain_graph)
        if not allow_unused and any(p not in found for p in chosen):
            raise RuntimeError(
                "One of the differentiated Tensors appears to not have been used in the graph. "
                "Set allow_unused=True if this is the desired behavior."
            )
        return tuple(found.get(p) for p in chosen)

    def _gradients(autograd_ctx_id: int, roots: Any, retain_graph: bool) -> dict[Tensor, Tensor]:
        roots = [roots] if isinstance(roots, Tensor) else list(roots)
        autograd.backward(autograd_ctx_id, roots=roots, retain_graph=retain_graph)
        return get_gradients(autograd_ctx_id)

    def _differentiable(inputs: Any) -> tuple[torch.Tensor, ...]:
        inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        if not all(t.requires_grad for t in inputs):
            raise RuntimeError("One of the differentiated Tensors does not require grad")
        return inputs
