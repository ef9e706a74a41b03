"""Lazy layers (`nn.LazyLinear`, ...): their parameters are made in a first call, which must be one of plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parameter import is_lazy


def lazy_layer(model: nn.Module) -> str | None:
    """The name of a layer that waits for its first call, `"model"` for the model itself."""
    return next((name or "model" for name, layer in model.named_modules() if _waits(layer)), None)


def check_initialised(model: nn.Module, learner: str) -> None:
    """Raise ValueError for a model with lazy layers, where the learner has rates like its parameters."""
    name = lazy_layer(model)
    if name is not None:
        raise ValueError(
            f"layer {name!r} is lazy and has no parameters yet, and {learner} makes rates for them: run the model once "
            "on an example first"
        )


def initialise(learner: nn.Module, run: Callable[[], object]) -> None:
    """Let `run()` be the first call of the learner's lazy layers; what it writes into buffers is dropped."""
    lazy = [layer for layer in learner.modules() if _waits(layer)]
    if not lazy:
        return
    kept: list[tuple[nn.Module, str, torch.Tensor, torch.Tensor]] = []

    def keep(layer: nn.Module, *_) -> None:
        kept.extend((layer, name, b, b.clone()) for name, b in layer._buffers.items() if b is not None)

    with torch.inference_mode(False), torch.no_grad():
        for layer in set(learner.modules()) - set(lazy):
            keep(layer)
        hooks = [layer.register_forward_pre_hook(keep) for layer in lazy]  # after the one that makes the parameters
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
            for layer, name, buffer, value in reversed(kept):  # a layer that is called twice is as before the first
                layer._buffers[name] = buffer.copy_(value)


def _waits(layer: nn.Module) -> bool:
    own = (*layer._parameters.values(), *layer._buffers.values())
    return hasattr(layer, "_initialize_hook") or any(part is not None and is_lazy(part) for part in own)
