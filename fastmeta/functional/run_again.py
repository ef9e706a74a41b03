"""A module called with weights that are not its own, also where autograd runs a part of it once more.

`torch.utils.checkpoint` runs a checkpointed part again during the backward. `torch.func.functional_call` has put the
module's own weights back by then, so the part would find those, and the gradient would be wrong without a word.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import stateless
from torch.nn.utils.stateless import _reparametrize_module
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._device import DeviceContext
from torch.utils.checkpoint import checkpoint


def functional_call(
    model: nn.Module,
    params: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
    args: Any = (),
    kwargs: dict[str, Any] | None = None,
) -> Any:
    """`model(*args, **kwargs)` with `params` in place of its own: `torch.func.functional_call` for models that
    checkpoint activations.

    `torch.utils.checkpoint` runs a part again in the backward, when `torch.func.functional_call` has put the model's
    own weights back: the gradient is then silently that of other weights. Here the part finds `params` again.

    Args:
        model: any module; its checkpoints must have `use_reentrant=False`.
        params: tensors by the names of its parameters and buffers, or several such dicts; what they do not name stays.
        args: a tuple of arguments, or a single one.
        kwargs: keyword arguments.

    Returns:
        What the model returns.
    """
    weights = params if isinstance(params, Mapping) else {name: t for part in params for name, t in part.items()}
    return call_again(model, weights, args if isinstance(args, tuple) else (args,), kwargs)


def call_with(model: nn.Module, weights: Mapping[str, Tensor], args: tuple, kwargs: dict[str, Any] | None = None):
    """As `torch.func.functional_call` with `weights`, by which a layer that the model holds in two places loses its
    parameters: torch puts them back in the order in which it took them out, so that the layer keeps `weights`."""
    if isinstance(model, (torch.jit.ScriptModule, nn.DataParallel)):
        return torch.func.functional_call(model, dict(weights), args, kwargs)  # which says that it cannot
    with _reparametrize_module(model, dict(weights), tie_weights=True, stack_weights=True):
        return model(*args, **(kwargs or {}))


def call_again(model: nn.Module, weights: Mapping[str, Tensor], args: tuple, kwargs: dict[str, Any] | None = None):
    """As `torch.func.functional_call` with `weights` (parameters and buffers), which checkpointed parts find again."""
    if torch.compiler.is_compiling():  # dynamo would take what follows for a plain device context, without the weights
        with RefuseStaleWeights():  # where it gives up it calls parts as they are
            return call_with(model, weights, args, kwargs)
    with _Weights(model, weights):
        return model(*args, **(kwargs or {}))


class _Weights(DeviceContext):
    """While active the module has these weights, and attention the form that it had when this was made.

    A checkpointed part enters again whatever device context it was first run under, and nothing else: so this is one,
    of the device that is the default anyway.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]):
        self.model, self.weights = model, weights
        active = (mode for mode in reversed(_get_current_function_mode_stack()) if isinstance(mode, DeviceContext))
        self.outer = next(active, None) if torch._C._len_torch_function_stack() else None
        self.plain_attention = not torch.backends.cuda.flash_sdp_enabled()  # so named, and of the CPU too
        self.entered: list[list[AbstractContextManager]] = []  # a part may be run again while the module runs

    @property
    def device(self) -> torch.device:  # for who looks through the modes for the default
        return torch.device("cpu") if self.outer is None else self.outer.device

    def __enter__(self) -> _Weights:
        entered: list[AbstractContextManager] = []
        try:
            for context in (*self._as_at_first(), self._in_the_model()):
                context.__enter__()
                entered.append(context)
        except BaseException:
            _leave(entered, *sys.exc_info())
            raise
        _push_mode(self)
        self.entered.append(entered)
        return self

    def __exit__(self, *error) -> None:
        _pop_mode()
        _leave(self.entered.pop(), *error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))

    def _in_the_model(self) -> AbstractContextManager:
        # put back in reverse order, see `call_with`
        return _reparametrize_module(self.model, dict(self.weights), tie_weights=True, stack_weights=True)

    def _as_at_first(self) -> Iterator[AbstractContextManager]:
        """What is missing in the backward: no mode is active there, the user's default device neither."""
        if self.outer is not None and self.outer not in _get_current_function_mode_stack():
            yield self.outer
        if self.plain_attention and torch.backends.cuda.flash_sdp_enabled():
            yield sdpa_kernel(SDPBackend.MATH)


def _leave(contexts: list[AbstractContextManager], *error) -> None:
    """Out of all of them, the last first, whatever one of them raises."""
    while contexts:
        try:
            contexts.pop().__exit__(*error)
        except BaseException:
            if contexts:
                _leave(contexts, *sys.exc_info())
            raise


class RefuseStaleWeights(TorchFunctionMode):
    """While active, a part that is checkpointed under `torch.func.functional_call` is an error, and not run again later
    with weights that are not those of the call."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if torch.compiler.is_compiling():  # a compiled part holds the weights that it was called with; no hooks there
            return func(*args, **(kwargs or {}))
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks and getattr(hooks[0], "__module__", None) == checkpoint.__module__ and _checkpointed_under_a_call():
            raise RuntimeError(
                "a part that is checkpointed under torch.func.functional_call, or where torch.compile gives up, runs "
                "again with the model's own weights, and its gradient would be wrong: take "
                "fastmeta.functional.functional_call, not compiled"
            )
        return func(*args, **(kwargs or {}))


def _checkpointed_under_a_call() -> bool:
    checkpointed, frame = False, sys._getframe(2)
    while frame is not None:
        checkpointed = checkpointed or frame.f_code.co_filename == _CHECKPOINT
        if checkpointed and frame.f_code in (stateless._functional_call.__code__, call_with.__code__):
            return True
        frame = frame.f_back
    return False


_CHECKPOINT = sys.modules[checkpoint.__module__].__file__
