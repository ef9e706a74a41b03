"""What has no second derivative: kernels, put aside while a loss is to be differentiated twice, and compiled losses,
refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


@contextmanager
def twice_differentiable(cuda: bool) -> Iterator[None]:
    """While active, attention and recurrent layers run by kernels that plain autograd can differentiate twice: those of
    fused attention and, on CUDA tensors, of cuDNN's recurrent layers have no second derivative."""
    with sdpa_kernel(SDPBackend.MATH), _WithoutCudnn() if cuda else nullcontext():
        yield


class _WithoutCudnn(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in _RECURRENT:
            return func(*args, **(kwargs or {}))
        with torch.backends.cudnn.flags(enabled=False):
            return func(*args, **(kwargs or {}))


_COMPILED = (
    "a gradient comes out of a function that torch.compile has compiled, which cannot be differentiated twice: the "
    "meta-gradient would lack its second derivatives, silently in torch.autograd.grad. Compile the whole step, or "
    "nothing of the inner loss, or take first-order gradients"
)


def differentiate(outputs: Any, inputs: Any, *, create_graph: bool = False, **options: Any) -> tuple:
    """`torch.autograd.grad`, which refuses to give a graph to what could not be differentiated through it.

    Raises:
        RuntimeError: as `refuse_compiled`; or what else autograd refuses.
    """
    try:
        found = torch.autograd.grad(outputs, inputs, create_graph=create_graph, **options)
    except RuntimeError as error:
        if "donated buffers" in str(error):  # its advice, to switch these off, leads to the wrong gradient
            raise RuntimeError(_COMPILED) from error
        raise
    if create_graph:
        refuse_compiled(found, inputs)
    return found


def refuse_compiled(gradients: Any, params: Any) -> None:
    """Raises where `gradients`, taken with a graph for those of `params` (any pytrees), have a compiled backward in it.

    PyTorch has an error for whoever differentiates that, but does not come by it where it is asked for the gradient of
    given tensors: nothing leads on from there. So it is looked for, in programs that have compiled anything.

    Raises:
        RuntimeError: such a gradient.
    """
    if torch.compiler.is_compiling() or "torch._functorch.aot_autograd" not in sys.modules:
        return
    seen = _nodes(params)  # what lies behind has been looked at in the step before
    todo = list(_nodes(gradients))
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if type(node).__name__ == "CompiledFunctionBackwardBackward":
            raise RuntimeError(_COMPILED)
        seen.add(node)
        todo += [following for following, _ in node.next_functions]


def _nodes(tree: Any) -> set:
    return {leaf.grad_fn for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)}
