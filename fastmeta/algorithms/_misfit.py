"""Why a call failed, where it is the examples that a module does not take, or targets that do not fit what it returns:
said with the argument's name.

What a module takes cannot be known by looking at it. So nothing is asked before a call, which costs nothing and refuses
nothing that works; after one that failed, the module itself is called with one task's rows.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta._trees import arguments, described, first, split, unbind
from fastmeta.values import dtype_of

from ..engines import Loss, check_prediction
from ..functional.run_again import call_with

_TORCH = str(Path(torch.__file__).parent)
_SAYS_ENOUGH = tuple(str(Path(__file__).parent.parent / folder) for folder in ("algorithms", "engines"))


def raise_misfit(
    error: Exception,
    name: str,
    module: nn.Module,
    examples: Mapping[str, Any],
    targets: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
) -> None:
    """Raise a TypeError or ValueError if `module`, called `name`, does not take some of the `examples` `[T, B, ...]`,
    or `loss` of what it returns not their `targets`; else return, for `error` to be raised again."""
    if isinstance(error, torch.OutOfMemoryError) or torch._C._are_functorch_transforms_active():
        return
    if isinstance(error, (TypeError, ValueError)) and _innermost(error).startswith(_SAYS_ENOUGH):
        return
    predictions = []
    for key, x in examples.items():
        prediction, said = called(module, x)
        if said is not None:
            raise _misfit(key, x, name, module, said) from error
        predictions.append(prediction)
    for x_name, prediction, (key, y) in zip(examples, predictions, (targets or {}).items(), strict=False):
        if not isinstance(y, Tensor) or not isinstance(prediction, Tensor):
            continue
        device = first(examples[x_name]).device
        if y.device != device:
            raise ValueError(f"{key} is on {y.device}, but {x_name} is on {device}: they must agree") from error
        if loss is not None:
            check_prediction(loss, prediction.unsqueeze(0).expand(len(y), *prediction.shape), y, key)
        if y.is_floating_point() and y.dtype != prediction.dtype:
            raise TypeError(
                f"{key} is {dtype_of(y)}, but what {name} returns is {dtype_of(prediction)}: they must agree"
            ) from error


def _misfit(key: str, x: Any, name: str, module: nn.Module, said: str) -> Exception:
    if not isinstance(x, Tensor):
        return ValueError(f"{key} is {described(x)}, which {name} does not take: {said}")
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    if parameter is not None and x.device != parameter.device:
        return ValueError(f"{key} is on {x.device}, but {name}'s parameters are on {parameter.device}: they must agree")
    if parameter is not None and x.dtype != parameter.dtype and (x.is_floating_point() or "type" in said):
        return TypeError(f"{key} is {dtype_of(x)}, but {name}'s parameters are {dtype_of(parameter)}: {said}")
    return ValueError(f"{key} has rows of shape {list(x.shape[2:])}, which {name} does not take: {said}")


def called(module: nn.Module, x: Any) -> tuple[Any, str | None]:
    """What the module makes of one task's rows, and what a layer of torch has to say against them; None and None where
    it is not torch that fails, or there are no rows."""
    if first(x).dim() < 2 or not len(first(x)):
        return None, None
    args, kwargs = arguments(unbind(split(x, 1)[0])[0])
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}  # statistics stay as they are
    try:
        with torch.no_grad(), torch.random.fork_rng([first(x).device] if first(x).is_cuda else []):
            return call_with(module, buffers, args, kwargs), None
    except TypeError:  # it takes something else than examples
        return None, None
    except Exception as error:
        inside = _innermost(error).startswith(_TORCH)
        return None, (str(error).strip().splitlines() or [type(error).__name__])[0] if inside else None


def _innermost(error: Exception) -> str:
    """The file that raised it."""
    return traceback.extract_tb(error.__traceback__)[-1].filename
