"""The leading layers of a model that do not adapt: they run once, in front of the inner loop, which passes their
gradient on."""

from __future__ import annotations

from collections.abc import Collection
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..engines import InnerLoop, module_engine
from ..engines.inspect import MLPSpec, mlp_spec
from ._blocks import call

_parts: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()


def encoded(model: nn.Module, adapting: Collection[str], *parts: Tensor) -> tuple[nn.Module, list[Tensor]]:
    """The rest of the model behind leading layers of which none adapts, and what these make of rows `[T, B, ...]`.

    All of the model and the rows themselves where there are none, or where they take or pass on more than one tensor.
    """
    encoder, rest = split(model, adapting)
    if encoder is None or not isinstance(parts[0], Tensor):
        return model, list(parts)
    features = encode(encoder, *parts)
    if isinstance(features[0], Tensor):
        return rest, features
    _parts[model] = (_parts[model][0], None, None)  # not again
    return model, list(parts)


def split(model: nn.Module, adapting: Collection[str]) -> tuple[nn.Module | None, nn.Module]:
    """An encoder of leading layers with parameters of which none adapts, or None; and the rest of the model.

    Parameters have the same names in the rest as in the model.
    """
    if type(model) is not nn.Sequential or model._forward_hooks or model._forward_pre_hooks:
        return None, model
    children = list(model.named_children())
    first = {name.partition(".")[0] for name in adapting}
    start = next((i for i, (name, _) in enumerate(children) if name in first), len(children))
    if start == len(children) or not any(any(True for _ in child.parameters()) for _, child in children[:start]):
        return None, model
    key = (start, *(id(child) for _, child in children))
    known = _parts.get(model)
    if known is None or known[0] != key:  # kept, so that looking at the parts is done once
        known = (key, model[:start], model[start:])
        _parts[model] = known
    return (None, model) if known[1] is None else known[1:]


def encode(encoder: nn.Module, *parts: Tensor) -> list[Tensor]:
    """Rows `[T, B, ...]` through a part that the tasks share.

    Its batch norms see one task's rows, as in the inner loop, unless they have running statistics: then all rows of all
    tasks together in train mode, and those statistics in eval mode, as in a prototypical network.
    """
    if isinstance(mlp_spec(encoder), MLPSpec) or _has_running_statistics(encoder):
        rows = torch.cat(parts, 1)
        features = call(encoder, (rows.flatten(0, 1),), {})
        if not isinstance(features, Tensor):
            return [features]
        return list(features.unflatten(0, rows.shape[:2]).split([part.shape[1] for part in parts], 1))
    weights, no_steps = dict(encoder.named_parameters()), InnerLoop(0.0, 0, False, None)
    return [module_engine(encoder, no_steps, part).predict(encoder, weights, part) for part in parts]


def _has_running_statistics(encoder: nn.Module) -> bool:
    norms = [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    return bool(norms) and all(norm.running_mean is not None for norm in norms)
