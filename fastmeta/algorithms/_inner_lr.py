"""The inner rate of a learner: a number, or one per step, or per layer, and whether it is trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import reduce

import torch
from torch import Tensor, nn

from fastmeta import values
from fastmeta.functional import checks

from ..engines import Adam, Rates, Rule

InnerLR = float | Tensor | Mapping[str, float | Tensor]


def as_inner_lr(
    model: nn.Module, inner_lr: InnerLR, learned: bool, steps: int
) -> float | nn.Parameter | nn.ParameterDict:
    """`inner_lr` as a learner keeps it. What is no single number is a parameter, trained or not, so that it moves with
    the learner and is saved with it."""
    values.flag("learn_inner_lr", learned)
    like = next(model.parameters(), torch.empty(0))
    dtype = reduce(torch.promote_types, {real_dtype(p) for p in model.parameters()} or {like.dtype})

    def parameter(name: str, rate: float | Tensor) -> nn.Parameter:
        rate = torch.as_tensor(_checked(name, rate, steps), dtype=dtype, device=like.device)
        return nn.Parameter(rate.detach().clone(), requires_grad=learned)

    if isinstance(inner_lr, Mapping):
        known = {part for name, _ in model.named_parameters(remove_duplicate=False) for part in _prefixes(name)}
        unknown = [name for name in inner_lr if name not in known]
        if unknown:
            raise ValueError(f"inner_lr: the model has no layer or parameter {unknown[0]!r} with parameters")
        if not inner_lr:
            raise ValueError("inner_lr must hold at least one rate, got none")
        return nn.ParameterDict({_key(n): parameter(f"inner_lr[{n!r}]", rate) for n, rate in inner_lr.items()})
    if isinstance(inner_lr, Tensor) or learned:
        return parameter("inner_lr", inner_lr)
    return _checked("inner_lr", inner_lr, steps)


def rates_of(inner_lr: float | Tensor | nn.ParameterDict, names: Collection[str]) -> float | Rates:
    """What engines take: the number, or the rates of the parameters `names`."""
    if isinstance(inner_lr, nn.ParameterDict):
        rates = {key: rate.reshape(-1) for key, rate in inner_lr.items()}
        found = {name: next((_key(p) for p in _prefixes(name) if _key(p) in rates), None) for name in names}
        without = [name for name, key in found.items() if key is None]
        if without:
            raise ValueError(f"inner_lr has no rate for {', '.join(without)}: '' names all layers without their own")
        return {name: rates[key] for name, key in found.items()}
    if isinstance(inner_lr, Tensor):
        return dict.fromkeys(names, inner_lr.reshape(-1))
    return inner_lr


def rates_like(named: Mapping[str, Tensor], names: Collection[str], rate: float) -> Rates:
    """The rates of the parameters `names` where all have one."""
    made: dict[tuple, Tensor] = {}
    for name in names:
        kind = real_dtype(named[name]), named[name].device
        if kind not in made:
            made[kind] = torch.full((1,), rate, dtype=kind[0], device=kind[1])
    return {name: made[real_dtype(named[name]), named[name].device] for name in names}


def real_dtype(p: Tensor) -> torch.dtype:
    """Of a rate of the parameter: one of complex numbers has a real rate, as in `torch.optim.SGD`."""
    return p.dtype.to_real() if p.is_complex() else p.dtype


def described(inner_lr: float | Tensor | nn.ParameterDict) -> str:
    if isinstance(inner_lr, nn.ParameterDict):
        layers = (key.removeprefix("layer/").replace("/", ".") for key in inner_lr)
        return f"{{{', '.join(map(repr, layers))}}}"
    return f"{list(inner_lr.shape)}" if isinstance(inner_lr, Tensor) else f"{inner_lr}"


OPTIMIZERS = ("sgd", "adam", "adamw")


def as_rule(
    momentum: float,
    weight_decay: float,
    clip_norm: float | None,
    clip_value: float | None,
    optimizer: str = "sgd",
    betas: tuple[float, float] = Adam().betas,
    eps: float = Adam().eps,
    amsgrad: bool = False,
) -> Rule:
    clips = [
        None if limit is None else values.number(name, limit, 0, open=True)
        for name, limit in (("clip_norm", clip_norm), ("clip_value", clip_value))
    ]
    rule = Rule(values.number("momentum", momentum, 0), values.number("weight_decay", weight_decay, 0), *clips)
    values.choice("inner_optimizer", optimizer, OPTIMIZERS)
    adam = Adam(_betas(betas), values.number("eps", eps, 0), values.flag("amsgrad", amsgrad), optimizer == "adamw")
    if optimizer == "sgd":
        if adam != Adam():
            raise ValueError("betas, eps and amsgrad are Adam's: with inner_optimizer='sgd' they have no meaning")
        return rule
    if rule.momentum:
        raise ValueError(f"momentum is SGD's: with inner_optimizer={optimizer!r} betas say what is remembered")
    return rule._replace(adam=adam)


def _betas(betas: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be a pair of numbers, got {values.shown(betas)}")
    first, second = (values.number(f"betas[{i}]", beta, 0, below=1.0) for i, beta in enumerate(betas))
    return first, second


def _checked(name: str, rate: float | Tensor, steps: int) -> float | Tensor:
    if not isinstance(rate, Tensor):
        if not isinstance(rate, (int, float)):
            raise TypeError(f"{name} must be a number, a tensor [] or [K], or a dict of such, got {values.shown(rate)}")
        return values.number(name, rate, 0)
    checks.tensor_of_any_shape(name, rate)
    if rate.dim() > 1 or rate.dim() == 1 and len(rate) != max(steps, 1):
        raise ValueError(f"{name} must have shape [] or [K] = {[max(steps, 1)]}, got {list(rate.shape)}")
    if not bool((rate >= 0).all() and rate.isfinite().all()):
        raise ValueError(f"{name} must be at least 0 and finite, got {rate.tolist()}")
    return rate


def _prefixes(name: str) -> list[str]:
    """A parameter's own name, then its layers', from within: the first that has a rate counts."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), -1, -1)]


def _key(name: str) -> str:
    """What a layer is called in a `ParameterDict`: never like an attribute of the dict, as `values` would be."""
    return "layer/" + name.replace(".", "/")
