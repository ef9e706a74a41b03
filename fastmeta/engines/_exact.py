"""Operations whose second derivative `torch.func` gets wrong or refuses, rewritten while an inner gradient is taken.

Under `vmap(grad(...))` torch differentiates the affine part of batch, layer and instance norms with the saved
mean and deviation taken for constants, so a further derivative silently lacks terms (the meta-gradient of a
LayerNorm net is off in the second digit; a loop over tasks is right). The same norm without its affine part
is right, so the affine part is applied by hand. Fused attention has no second derivative at all; its plain
form has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ._recurrent import WRITTEN_OUT


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """While active, norms, attention and recurrent layers run in a form whose derivatives are exact to the second
    order."""
    with sdpa_kernel(SDPBackend.MATH), _Rewritten(_REWRITTEN):
        yield


def outside_inference_mode(function: Callable) -> Callable:
    """`function`, which takes an inner gradient, run outside inference mode if called in it.

    There autograd records nothing, so that the inner gradient would be zero without a word (in torch 2.11 that of
    `torch.func` too). Tensors made in that mode cannot take part either; copies of them can.
    """

    @wraps(function)
    def run(*args):
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return function(*args)
        with torch.inference_mode(False), torch.no_grad():
            return function(*pytree.tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, args))

    return run


def gradients_per_task(task_loss: Callable, in_dims=0, *, second_order: bool) -> Callable:
    """`vmap(grad(task_loss), in_dims)`, exact to the second order if that is wanted, in inference mode too."""
    gradients = torch.func.vmap(torch.func.grad(task_loss), in_dims=in_dims, randomness="different")

    @outside_inference_mode
    def computed(*args):
        # grad() computes inside whatever the mode outside; without second order only the result stays off the graph
        exact = twice_differentiable() if second_order else mappable()
        with torch.set_grad_enabled(second_order), exact:
            return gradients(*args)

    return computed


class _Rewritten(TorchFunctionMode):
    def __init__(self, functions: dict[Callable, Callable]):
        super().__init__()
        self.functions = functions

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.functions.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def mappable() -> Iterator[None]:
    """While active, recurrent layers, embeddings and attention run in a form that can be mapped over
    tasks, at once and not one by one."""
    with sdpa_kernel(SDPBackend.MATH), _Rewritten(MAPPABLE):
        yield


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    if weight is not None:
        x = x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def _per_channel(x: Tensor) -> list[int]:
    return [1, -1] + [1] * (x.dim() - 2)


def _batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
) -> Tensor:
    normal = F.batch_norm(input, running_mean, running_var, None, None, training, momentum, eps)
    return _affine(normal, weight, bias, _per_channel(input))


def _instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
) -> Tensor:
    normal = F.instance_norm(input, running_mean, running_var, None, None, use_input_stats, momentum, eps)
    return _affine(normal, weight, bias, _per_channel(input))


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True) -> Tensor:
    return _affine(F.layer_norm(input, normalized_shape, None, None, eps), weight, bias, tuple(normalized_shape))


def _embedding(
    input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False
) -> Tensor:
    _check_counts(scale_grad_by_freq)
    found = F.embedding(input, weight, None, max_norm, norm_type, scale_grad_by_freq)
    if padding_idx is None:
        return found
    # mapped, torch forgets that the padding's row gets no gradient
    padding = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
    return torch.where(padding, found.detach(), found)


def _check_counts(scale_grad_by_freq: bool) -> None:
    if scale_grad_by_freq and torch._C._are_functorch_transforms_active():
        raise ValueError("scale_grad_by_freq: mapped over tasks, it would count how often an index is in all of them")


def _dense_embedding(
    input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False
) -> Tensor:
    return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)


def _dense_embedding_bag(
    input, weight, offsets=None, max_norm=None, norm_type=2, scale_grad_by_freq=False, mode="mean", sparse=False, *rest,
    **options,
) -> Tensor:  # fmt: skip
    _check_counts(scale_grad_by_freq)
    return F.embedding_bag(
        input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, False, *rest, **options
    )


@contextmanager
def dense_gradients() -> Iterator[None]:
    """While active, embeddings have dense gradients: sparse ones cannot be stacked, nor differentiated again."""
    with _Rewritten(_DENSE):
        yield


_DENSE = {F.embedding: _dense_embedding, F.embedding_bag: _dense_embedding_bag}
MAPPABLE = {**_DENSE, **WRITTEN_OUT, F.embedding: _embedding}
_REWRITTEN = {
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    **MAPPABLE,
}
