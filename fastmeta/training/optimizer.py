"""The outer loop's optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


class Adam(torch.optim.Adam):
    """PyTorch's Adam in one pass over memory (`fused`), where it has that for all the parameters.

    `update` is `step` for a training loop: it takes gradients however they lie in memory, and does not look up anew
    what stays the same from step to step, which for a small network takes longer than the arithmetic.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float):
        parameters = list(parameters)
        self._lists: tuple[list[Tensor], ...] | None = None
        self._steps = torch.empty(0)
        super().__init__(parameters, lr=lr, fused=all(map(_in_one_pass, parameters)) or None)

    def update(self) -> None:
        group, gradients = self.param_groups[0], []
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is not None and gradient.layout is torch.strided and gradient.stride() != parameter.stride():
                # On the CPU the one pass pairs numbers as they lie, whatever the strides: a transposed gradient
                # would go to other weights.
                gradient = torch.empty_like(parameter, requires_grad=False).copy_(gradient)
                parameter.grad = gradient
            gradients.append(gradient)
        if self._lists is None or any(gradient is None for gradient in gradients) or self._hooked():
            self.step()
            self._lists = self._found()
            return
        parameters, means, squares, steps = self._lists
        beta1, beta2 = group["betas"]
        self._steps.add_(1)
        grad_mode = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # `torch.no_grad` takes as long as a third of the arithmetic
        try:
            torch._fused_adam_(
                parameters, gradients, means, squares, [], steps, lr=group["lr"], beta1=beta1, beta2=beta2,
                weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=group["maximize"],
            )  # fmt: skip
        finally:
            torch._C._set_grad_enabled(grad_mode)

    def _found(self) -> tuple[list[Tensor], ...] | None:
        """What the next `update` needs no `step` for; None where it does: at first, and for what is not all alike."""
        group, parameters = self.param_groups[0], self.param_groups[0]["params"]
        states = [self.state.get(parameter, {}) for parameter in parameters]
        alike = len(self.param_groups) == 1 and len({(p.device, p.dtype) for p in parameters}) == 1
        plain = group["fused"] and not (group["amsgrad"] or group["decoupled_weight_decay"] or group["differentiable"])
        if not (alike and plain and all(states)):
            return None
        # the counts of steps become parts of one tensor: one addition counts for all
        self._steps = torch.stack([state["step"] for state in states])
        for state, step in zip(states, self._steps.unbind(), strict=True):
            state["step"] = step
        return (parameters, *([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step")))

    def _hooked(self) -> bool:
        own = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        return bool(own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lists = None


def _in_one_pass(parameter: Tensor) -> bool:
    if isinstance(parameter, UninitializedTensorMixin) or parameter.device.type not in ("cpu", "cuda"):
        return False
    if type(parameter) is not torch.nn.Parameter or not parameter.is_floating_point():
        return False
    # it goes from number to number in memory: of a view with gaps it would change what lies between
    return torch.empty_like(parameter).stride() == parameter.stride()
