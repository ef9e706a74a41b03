"""The engine for whatever plain PyTorch can differentiate: autograd itself, one task after the other.

What it gives is the definition of right for every other engine. The module runs as it is: its hooks see ordinary
tensors of one task; checkpointed blocks, `autograd.Function`s of a user's own and masks that depend on the data are all
allowed. Its buffers are copied for each run, as in the vmap engine, and what `forward` writes into them is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ._base import InnerLoop, Parameters, is_shared
from ._exact import outside_inference_mode
from .vmap import check_statistics


class LoopEngine:
    """Plain autograd, one task after the other: whatever PyTorch can differentiate."""

    name = "loop"

    def why_not(self, model: nn.Module, inner: InnerLoop, support_x: Tensor) -> str | None:
        return None

    def why_slow(self, model: nn.Module, inner: InnerLoop, support_x: Tensor) -> str | None:
        return None

    def adapt(self, model: nn.Module, inner: InnerLoop, support_x: Tensor, support_y: Tensor) -> dict[str, Tensor]:
        slow = dict(model.named_parameters())
        tasks = [_steps(model, inner, slow, *task) for task in zip(support_x, support_y, strict=True)]
        changed = {name for weights in tasks for name, w in weights.items() if w is not slow[name]}
        return {n: torch.stack([w[n] for w in tasks]) if n in changed else p for n, p in slow.items()}

    def query(
        self, model: nn.Module, inner: InnerLoop, support_x: Tensor, support_y: Tensor, query_x: Tensor
    ) -> Tensor:
        slow, predictions = dict(model.named_parameters()), []
        for x, y, qx in zip(support_x, support_y, query_x, strict=True):
            predictions.append(_call(model, _steps(model, inner, slow, x, y), qx))
        return torch.stack(predictions)

    def predict(self, model: nn.Module, weights: Parameters, x: Tensor) -> Tensor:
        slow = dict(model.named_parameters())
        shared = {name: w for name, w in weights.items() if is_shared(w, slow[name])}
        own = {name: w for name, w in weights.items() if name not in shared}
        return torch.stack([_call(model, shared | {n: w[t] for n, w in own.items()}, rows) for t, rows in enumerate(x)])


def _call(model: nn.Module, weights: Parameters, x: Tensor) -> Tensor:
    check_statistics(model)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return functional_call(model, (dict(weights), buffers), (x,))


@outside_inference_mode
def _steps(model: nn.Module, inner: InnerLoop, slow: Parameters, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """One task's weights by name; those that no step has changed are the slow ones themselves."""
    second_order = torch.is_grad_enabled() and not inner.first_order
    weights = dict(slow)
    for _ in range(inner.steps):
        fast = {n: w for n, w in weights.items() if slow[n].requires_grad}
        if not second_order:
            fast = {n: w.detach().requires_grad_() for n, w in fast.items()}
        gradients = _gradient(model, inner, weights | fast, fast, x, y, second_order)
        for name, gradient in gradients.items():
            weights[name] = weights[name] - inner.lr * gradient
    return weights


def _gradient(
    model: nn.Module, inner: InnerLoop, weights: Parameters, fast: Parameters, x: Tensor, y: Tensor, second_order: bool
) -> dict[str, Tensor]:
    """Of one task's support loss, for those of `fast` that the loss depends on."""
    with torch.enable_grad(), _twice_differentiable(model) if second_order else nullcontext():
        prediction = _call(model, weights, x)
        inner.loss.check((1, *prediction.shape), y.unsqueeze(0), "support_y")
        loss = inner.loss.one_task(prediction, y)
        if not loss.requires_grad or not fast:
            return {}
        found = torch.autograd.grad(loss, list(fast.values()), create_graph=second_order, allow_unused=True)
    return {name: gradient for name, gradient in zip(fast, found, strict=True) if gradient is not None}


@contextmanager
def _twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Fused attention has no second derivative, nor have cuDNN's recurrent layers; their plain forms have."""
    recurrent = any(isinstance(layer, nn.RNNBase) for layer in model.modules())
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext():
        yield
