"""`higher.optim`: torch's optimisers, with steps that can be differentiated."""

from __future__ import annotations

import abc
import collections
import copy
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastmeta.functional.second_order import differentiate
from fastmeta.functional.update_rules import adam, average, largest, root, velocity

from .utils import _recursive_map, copied, flatten

_GroupedGradsType = list[list[Tensor]]
_StateType = list[dict[int, Any]]
_GradClosureType = Callable[[Tensor], Tensor]
_OverrideType = dict[str, list[Any]]
_GradCallbackType = Callable[[list[Tensor]], list[Tensor]]


class DifferentiableOptimizer(abc.ABC):
    """An optimiser that begins with the settings and the state of another one.

    A class for `register_optim` defines `_update(grouped_grads)`. For group `i`, parameter `j`, it finds the weight in
    `self.param_groups[i]["params"][j]`, where it leaves the new one, and its state in `self.state[i][j]`, a dict; the
    gradient may be None.

    Args:
        other: the optimiser to begin with; it does not change.
        reference_params: the parameters of the model, in the order in which `step` knows them.
        fmodel: a patched module, whose fast weights are replaced in each step.
        device: where the state goes.
        override: hyper-parameters by name, each a list of one value, or one per parameter group.
        grad_callback: what is made of the list of gradients before each step, such as clipping.
        track_higher_grads: False forgets the graph after each step.
    """

    def __init__(
        self,
        other: torch.optim.Optimizer,
        reference_params: Iterable[Tensor],
        fmodel: Any = None,
        device: torch.device | None = None,
        override: _OverrideType | None = None,
        grad_callback: _GradCallbackType | None = None,
        track_higher_grads: bool = True,
        **kwargs,
    ):
        places = {id(p): i for i, p in enumerate(reference_params)}
        self.param_groups: list[dict[str, Any]] = []
        self._group_to_param_list: list[list[int]] = []
        self.state: list[dict[int, dict[str, Any]]] = []
        for group in other.param_groups:
            indices, state = [], collections.defaultdict(dict)
            for i, p in enumerate(group["params"]):
                if id(p) not in places:
                    raise ValueError(f"Could not find parameter {p} in reference parameters.")
                indices.append(places[id(p)])
                if p in other.state:
                    state[i] = {key: _copied_state(key, value, device) for key, value in other.state[p].items()}
            settings = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
            self.param_groups.append({"params": [None] * len(indices), **settings})
            self._group_to_param_list.append(indices)
            self.state.append(state)
        if override is not None:
            self._apply_override(override)
        self._grad_callback = grad_callback
        self._fmodel = fmodel
        self._track_higher_grads = track_higher_grads

    def _apply_override(self, override: _OverrideType) -> None:
        for key, values in override.items():
            for group, value in zip(self.param_groups, _per_group(key, values, self.param_groups), strict=True):
                group[key] = value

    def step(
        self,
        loss: Tensor,
        params: Iterable[Tensor] | None = None,
        override: _OverrideType | None = None,
        grad_callback: _GradCallbackType | None = None,
        **kwargs,
    ) -> list[Tensor]:
        """Takes a step down `loss`.

        Args:
            loss: of one element.
            params: the weights to differentiate with respect to. Default: the fast weights of the patched module.
            override: hyper-parameters from this step on, as at construction.
            grad_callback: for this step, in place of that given at construction.

        Returns:
            The new weights, which the patched module has too. What is frozen or not used stays as it is.
        """
        if override is not None:
            self._apply_override(override)
        if params is None:
            params = None if self._fmodel is None else self._fmodel.fast_params
            if params is None:
                raise ValueError("params must be given to step where the optimiser has no patched module with weights")
        params = list(params)
        # what is frozen has no gradient: its place is taken by a tensor that the loss does not know
        targets = [p if p.requires_grad else torch.empty(0, requires_grad=True) for p in params]
        grads = differentiate(loss, targets, create_graph=self._track_higher_grads, allow_unused=True)
        grad_callback = self._grad_callback if grad_callback is None else grad_callback
        if grad_callback is not None:
            grads = grad_callback(grads)
        for group, indices in zip(self.param_groups, self._group_to_param_list, strict=True):
            group["params"] = [params[i] for i in indices]
        self._update([[grads[i] for i in indices] for indices in self._group_to_param_list])
        for group, indices in zip(self.param_groups, self._group_to_param_list, strict=True):
            for i, p in zip(indices, group["params"], strict=True):
                params[i] = p if self._track_higher_grads else p.detach().requires_grad_()
        if self._fmodel is not None:
            self._fmodel.update_params(params)
        return params

    @abc.abstractmethod
    def _update(self, grouped_grads: _GroupedGradsType, **kwargs) -> None: ...


def _copied_state(key: str, value: Any, device: torch.device | None) -> Any:
    if key in ("step", "eta", "mu"):  # which torch counts in float32 tensors
        return _number(value)
    return _recursive_map(value, lambda leaf: copied(leaf, device) if torch.is_tensor(leaf) else leaf)


class _ByTensor(DifferentiableOptimizer):
    """An optimiser that updates each weight by itself."""

    def _update(self, grouped_grads: _GroupedGradsType, **kwargs) -> None:
        for group, states, grads in zip(self.param_groups, self.state, grouped_grads, strict=True):
            for i, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                if g is not None:
                    if g.is_sparse:
                        kind = type(self).__name__.removeprefix("Differentiable")
                        raise RuntimeError(f"{kind} does not support sparse gradients")
                    g = -g if group.get("maximize") else g
                    group["params"][i] = self._moved(p, g, states[i], group)

    @abc.abstractmethod
    def _moved(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """The weight after the step from `p` along `g`."""


def _with_decay(p: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
    return g + group["weight_decay"] * p if group["weight_decay"] != 0 else g


def _counted(state: dict[str, Any], p: Tensor, *zeros: str) -> int:
    """The number of this step; before the first, the entries `zeros` are made."""
    if "step" not in state:
        state["step"] = 0
        state.update({name: torch.zeros_like(p.data) for name in zeros})
    state["step"] += 1
    return state["step"]


class DifferentiableSGD(_ByTensor):
    """`torch.optim.SGD`: momentum, dampening, Nesterov, decay."""

    def _moved(self, p, g, state, group):
        g = _with_decay(p, g, group)
        if group["momentum"] != 0:
            g, state["momentum_buffer"] = velocity(
                g, state.get("momentum_buffer"), group["momentum"], group["dampening"], group["nesterov"]
            )
        return p - group["lr"] * g


class DifferentiableAdam(_ByTensor):
    """`torch.optim.Adam`, with AMSGrad where asked for, and eps where higher 0.2.1 adds it: to `sqrt(v)` itself, before
    the correction of its bias, so that the step is `lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)`."""

    _decoupled = _eps_after_correction = False

    def _moved(self, p, g, state, group):
        if self._decoupled or group.get("decoupled_weight_decay"):
            p = p * (1 - group["lr"] * group["weight_decay"])
        else:
            g = _with_decay(p, g, group)
        beta1, beta2 = group["betas"]
        step = _counted(state, p, "exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * bool(group["amsgrad"]))
        mean = state["exp_avg"] = average(state["exp_avg"], g, beta1)
        square = state["exp_avg_sq"] = average(state["exp_avg_sq"], g * g, beta2)
        if group["amsgrad"]:
            square = state["max_exp_avg_sq"] = largest(state["max_exp_avg_sq"], square)
        correction2 = _number(1 - beta2**step)
        eps = group["eps"] if self._eps_after_correction else group["eps"] / math.sqrt(correction2)
        return adam(p, mean, square, group["lr"], 1 - beta1**step, correction2, eps)


class DifferentiableAdamW(DifferentiableAdam):
    """`torch.optim.AdamW`, which came to higher after 0.2.1: the weights decay by themselves, and eps is torch's."""

    _decoupled = _eps_after_correction = True


class DifferentiableAdadelta(_ByTensor):
    """`torch.optim.Adadelta`."""

    def _moved(self, p, g, state, group):
        _counted(state, p, "square_avg", "acc_delta")
        g, rho, eps = _with_decay(p, g, group), group["rho"], group["eps"]
        state["square_avg"] = average(state["square_avg"], g * g, rho)
        delta = root(state["acc_delta"] + eps) / root(state["square_avg"] + eps) * g
        state["acc_delta"] = average(state["acc_delta"], delta * delta, rho)
        return p - group["lr"] * delta


class DifferentiableAdagrad(_ByTensor):
    """`torch.optim.Adagrad`."""

    def _moved(self, p, g, state, group):
        state["step"] += 1
        g = _with_decay(p, g, group)
        state["sum"] = state["sum"] + g * g
        lr = group["lr"] / (1 + (state["step"] - 1) * group["lr_decay"])
        return p - lr * (g / (root(state["sum"]) + group["eps"]))


class DifferentiableAdamax(_ByTensor):
    """`torch.optim.Adamax`."""

    def _moved(self, p, g, state, group):
        step = _counted(state, p, "exp_avg", "exp_inf")
        g = _with_decay(p, g, group)
        beta1, beta2 = group["betas"]
        state["exp_avg"] = average(state["exp_avg"], g, beta1)
        state["exp_inf"] = torch.maximum(beta2 * state["exp_inf"], g.abs() + group["eps"])
        return p - group["lr"] / (1 - beta1**step) * (state["exp_avg"] / state["exp_inf"])


class DifferentiableASGD(_ByTensor):
    """`torch.optim.ASGD`. Its running average `ax` takes in the decayed weights before the step, as in higher."""

    def _moved(self, p, g, state, group):
        lr, lambd = group["lr"], group["lambd"]
        step = _counted(state, p, "ax")
        eta, mu = state.setdefault("eta", lr), state.setdefault("mu", 1)
        g = _with_decay(p, g, group)
        p = p * (1 - lambd * eta)
        state["ax"] = p if mu == 1 else state["ax"] + (p - state["ax"]) * mu
        state["eta"] = lr / math.pow(1 + _number(lambd * lr * step), _number(group["alpha"]))
        state["mu"] = 1 / max(1, step - group["t0"])
        return p - eta * g


class DifferentiableRMSprop(_ByTensor):
    """`torch.optim.RMSprop`, centred and with momentum where asked for."""

    def _moved(self, p, g, state, group):
        momentum, alpha = group["momentum"], group["alpha"]
        zeros = ["square_avg"] + ["momentum_buffer"] * (momentum > 0) + ["grad_avg"] * bool(group["centered"])
        _counted(state, p, *zeros)
        g = _with_decay(p, g, group)
        below = state["square_avg"] = average(state["square_avg"], g * g, alpha)
        if group["centered"]:
            mean = state["grad_avg"] = average(state["grad_avg"], g, alpha)
            below = below - mean * mean
        g = g / (root(below) + group["eps"])
        if momentum > 0:
            g = state["momentum_buffer"] = momentum * state["momentum_buffer"] + g
        return p - group["lr"] * g


class DifferentiableRprop(_ByTensor):
    """`torch.optim.Rprop`. Its second derivatives are 0, since it reads only the sign of the gradient."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        warnings.warn(
            "Rprop reads only the sign of the gradient: what is learned through its steps has no second derivatives",
            stacklevel=2,
        )

    def _moved(self, p, g, state, group):
        _counted(state, p, "prev")
        if "step_size" not in state:
            state["step_size"] = torch.ones_like(g) * group["lr"]
        (down, up), one = group["etas"], torch.ones_like(g)
        agreement = g * state["prev"]
        factor = torch.where(agreement > 0, up, torch.where(agreement < 0, down, one))
        size = state["step_size"] = (state["step_size"] * factor).clamp(*group["step_sizes"])
        g = state["prev"] = torch.where(agreement < 0, 0, g)
        return p - g.sign() * size


def _number(value: float | Tensor) -> float:
    return value.item() if isinstance(value, Tensor) else value


_opt_mapping: dict[type[torch.optim.Optimizer], type[DifferentiableOptimizer]] = {
    torch.optim.Adadelta: DifferentiableAdadelta,
    torch.optim.Adagrad: DifferentiableAdagrad,
    torch.optim.Adam: DifferentiableAdam,
    torch.optim.AdamW: DifferentiableAdamW,
    torch.optim.Adamax: DifferentiableAdamax,
    torch.optim.ASGD: DifferentiableASGD,
    torch.optim.RMSprop: DifferentiableRMSprop,
    torch.optim.Rprop: DifferentiableRprop,
    torch.optim.SGD: DifferentiableSGD,
}


def _differentiable(kind: type[torch.optim.Optimizer]) -> type[DifferentiableOptimizer]:
    if kind not in _opt_mapping:
        raise ValueError(f"Optimizer type {kind} not supported by higher yet.")
    return _opt_mapping[kind]


def get_diff_optim(
    opt: torch.optim.Optimizer,
    reference_params: Iterable[Tensor],
    fmodel: Any = None,
    device: torch.device | None = None,
    override: _OverrideType | None = None,
    track_higher_grads: bool = True,
    **kwargs,
) -> DifferentiableOptimizer:
    """The differentiable version of an optimiser over a model's parameters, or over any leaf tensors: then each
    `step(loss, params=...)` is given the newest. Arguments as those of `DifferentiableOptimizer`.

    Raises:
        ValueError: an optimiser of a class that is not known, or a parameter of it that is not in `reference_params`.
    """
    return _differentiable(type(opt))(
        opt,
        reference_params,
        fmodel=fmodel,
        device=device,
        override=override,
        track_higher_grads=track_higher_grads,
        **kwargs,
    )


def create_diff_optim(
    opt_type: type[torch.optim.Optimizer],
    opt_kwargs: dict[str, Any] | None = None,
    params: Iterable[Tensor] | Iterable[dict[str, Any]] | None = None,
    fmodel: Any = None,
    device: torch.device | None = None,
    override: _OverrideType | None = None,
    track_higher_grads: bool = True,
    **kwargs,
) -> DifferentiableOptimizer:
    """A differentiable optimiser of the class `opt_type`, made with `opt_kwargs`.

    `params` are looked at for their shapes only; they may be parameter groups, dicts with `params` (a tensor or a list)
    and settings. Default: those of `fmodel`. The other arguments are those of `DifferentiableOptimizer`.

    Raises:
        ValueError: a class that is not known, or neither `params` nor `fmodel`.
    """
    kind = _differentiable(opt_type)
    if params is None and fmodel is None:
        raise ValueError("Must specify one of fmodel or params in kwargs.")

    def zeros(of: Tensor | Iterable[Tensor]) -> list[Tensor]:
        return [torch.zeros_like(p, requires_grad=True) for p in ([of] if torch.is_tensor(of) else of)]

    given = list(fmodel.parameters() if params is None else params)
    if given and isinstance(given[0], dict):
        given = [{**group, "params": zeros(group["params"])} for group in given]
        stand_ins = [p for group in given for p in group["params"]]
    else:
        given = stand_ins = zeros(given)
    opt = opt_type(given, **(opt_kwargs or {}))
    return kind(
        opt,
        stand_ins,
        fmodel=fmodel,
        device=device,
        override=override,
        track_higher_grads=track_higher_grads,
        **kwargs,
    )


def register_optim(optim_type: type[torch.optim.Optimizer], diff_optim_type: type[DifferentiableOptimizer]) -> None:
    """Lets `get_diff_optim` and the like answer an optimiser of `optim_type` with a `diff_optim_type`."""
    _opt_mapping[optim_type] = diff_optim_type


def get_trainable_opt_params(opt: torch.optim.Optimizer, device: torch.device | None = None) -> _OverrideType:
    """The hyper-parameters of an optimiser as an `override` of tensors that require gradients, one per group.

    Those are the numbers (bools count), and what holds nothing but numbers.
    """
    override: _OverrideType = collections.defaultdict(list)
    for group in opt.param_groups:
        for key, value in group.items():
            if key != "params" and all(isinstance(x, (int, float)) for x in flatten(value)):
                override[key].append(
                    _recursive_map(value, lambda x: torch.tensor(float(x), device=device, requires_grad=True))
                )
    return override


def apply_trainable_opt_params(opt: torch.optim.Optimizer, override: _OverrideType) -> None:
    """Writes learned hyper-parameters into the groups of an optimiser, as numbers of the kind that was there."""
    for key, values in override.items():
        for group, value in zip(opt.param_groups, _per_group(key, values, opt.param_groups), strict=True):
            group[key] = _written(value, group[key])


def _per_group(key: str, values: list[Any], groups: list[dict[str, Any]]) -> list[Any]:
    if len(values) not in (1, len(groups)):
        raise ValueError(
            f"Mismatch between the number of override tensors for optimizer parameter {key} and the number of "
            "parameter groups."
        )
    return values * len(groups) if len(values) == 1 else values


def _written(value: Any, target: Any) -> Any:
    """What replaces `target`: `value` as a number, or container of numbers, of the same kind."""
    if isinstance(target, Tensor):
        target.data = value.detach().to(target.device)
        return target
    if isinstance(value, Tensor) and not isinstance(target, (dict, list, tuple, set)):
        return type(target)(value.item())
    if not isinstance(value, type(target)):
        raise ValueError(f"cannot write {type(value).__name__} where there is {type(target).__name__} {target}")
    if isinstance(target, dict):
        return {key: _written(value[key], part) for key, part in target.items()}
    return type(target)([_written(v, t) for v, t in zip(value, target, strict=True)])


# for optimisers of one's own, which have been written with them
def _add(tensor: Tensor, a1: Any, a2: Tensor | None = None) -> Tensor:
    return tensor + a1 if a2 is None else tensor + a1 * a2


def _addcdiv(tensor: Tensor, a1: Any, a2: Tensor, a3: Tensor | None = None) -> Tensor:
    return tensor + a1 / a2 if a3 is None else tensor + a1 * (a2 / a3)


def _addcmul(tensor: Tensor, a1: Any, a2: Tensor, a3: Tensor | None = None) -> Tensor:
    return tensor + a1 * a2 if a3 is None else tensor + a1 * a2 * a3


def _get_mask_closure(mask: Tensor) -> _GradClosureType:
    """A hook for tensors that makes their gradients 0 where `mask` is True, and the gradients' own too."""

    def closure(grad: Tensor) -> Tensor:
        masked = torch.where(mask, torch.zeros_like(grad), grad)
        _maybe_mask(masked, mask)
        return masked

    return closure


def _maybe_mask(tensor: Tensor, mask: Tensor) -> None:
    if tensor.requires_grad:
        tensor.register_hook(_get_mask_closure(mask))
