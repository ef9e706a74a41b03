"""One inner step: what becomes of every task's weights and the gradient of its loss, whoever has found that.

As in PyTorch: gradients are clipped (`clip_grad_value_`, then `clip_grad_norm_`, here of one task), then stepped along
as `torch.optim.SGD` does: `g <- g + weight_decay * w`, `m <- momentum * m + g` (from 0), `w <- w - lr * m`; or as
`torch.optim.Adam` does. All of it is differentiable, clipping too. Where inner gradients count as constants, so do
clipped ones, but the decay does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmeta import functional

# Rates by name of the parameters that adapt, `[1, ...]` or `[K, ...]`: first the inner step, then one element or the
# parameter's own shape. Steps beyond the last have the last one's rate. What is not named is shared by all tasks, and
# trains through the inner loop without taking part in it.
Rates = Mapping[str, Tensor]

_EPSILON = 1e-6  # of `clip_grad_norm_`


class Adam(NamedTuple):
    """How a step of Adam is taken, as in `functional.adam_step`."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False
    decoupled: bool = False


class Rule(NamedTuple):
    """What is made of a gradient before the rate multiplies it."""

    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = None  # of all parameters of one task that adapt
    clip_value: float | None = None  # of each number; before clip_norm, where both are given
    adam: Adam | None = None  # in place of SGD

    @property
    def clips(self) -> bool:
        return self.clip_norm is not None or self.clip_value is not None


PLAIN = Rule()


class Steps:
    """The steps of one inner loop for all its tasks."""

    def __init__(self, lr: float | Rates, rule: Rule):
        self.lr, self.rule = lr, rule
        self.taken = 0
        self.moments: dict = {}

    def take(self, fast: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights `[T, *shape]` after one more step, from those, which the tasks may share, and their gradients."""
        momentum, weight_decay = self.rule.momentum, self.rule.weight_decay
        gradients = clipped(gradients, self.rule)
        if self.rule.adam is not None:
            return self._adam(self.rule.adam, fast, gradients)
        if weight_decay:
            gradients = {name: torch.add(g, fast[name], alpha=weight_decay) for name, g in gradients.items()}
        if momentum:
            if self.moments:
                gradients = {n: torch.add(g, self.moments[n], alpha=momentum) for n, g in gradients.items()}
            self.moments = dict(gradients)
        step, self.taken = self.taken, self.taken + 1
        if isinstance(self.lr, Mapping):
            rates = rates_at(self.lr, fast, step)
            return {name: w - rate * gradients[name] for (name, w), rate in zip(fast.items(), rates, strict=True)}
        if any(w.is_complex() for w in fast.values()) or len({(w.dtype, w.device) for w in fast.values()}) > 1:
            return {name: w - self.lr * gradients[name] for name, w in fast.items()}
        names = list(fast)  # lists, for which the update knows at once what it has checked before
        moved = functional.fast_weight_update([fast[n] for n in names], [gradients[n] for n in names], self.lr)
        return dict(zip(names, moved, strict=True))

    def _adam(
        self, adam: Adam, fast: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        kinds: dict[tuple, list[str]] = {}  # a model may have parts of several dtypes or on several devices
        for name, w in fast.items():
            kinds.setdefault((w.dtype, w.device), []).append(name)
        moved, step, self.taken = dict(fast), self.taken, self.taken + 1
        for kind, names in kinds.items():
            rates = dict(zip(names, rates_at(self.lr, names, step), strict=True))
            found, self.moments[kind] = functional.adam_step(
                {name: fast[name] for name in names}, {name: gradients[name] for name in names},
                self.moments.get(kind), lr=rates, weight_decay=self.rule.weight_decay, **adam._asdict(),
            )  # fmt: skip
            moved |= found
        return moved

    def take_alone(self, fast: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same of one task, without a dimension of tasks."""
        if self.rule == PLAIN and isinstance(self.lr, float):
            self.taken += 1
            return {name: torch.add(w, gradients[name], alpha=-self.lr) for name, w in fast.items()}
        moved = self.take(*({name: t.unsqueeze(0) for name, t in of.items()} for of in (fast, gradients)))
        return {name: w.squeeze(0) for name, w in moved.items()}


def clipped(gradients: Mapping[str, Tensor], rule: Rule) -> Mapping[str, Tensor]:
    """The tasks' gradients `[T, *shape]` as the rule clips them."""
    clip_norm, clip_value = rule.clip_norm, rule.clip_value
    if clip_value is not None:
        gradients = {name: g.clamp(-clip_value, clip_value) for name, g in gradients.items()}
    if clip_norm is not None and gradients:
        # the norm of a zero gradient stays away from the square root, which has no slope there
        scale = (clip_norm / (_norm_of_tasks(gradients.values()) + _EPSILON)).clamp(max=1.0)
        gradients = {n: g * scale.to(g.dtype).view(-1, *[1] * (g.dim() - 1)) for n, g in gradients.items()}
    return gradients


def _norm_of_tasks(gradients: Iterable[Tensor]) -> Tensor:
    """`[T]`, at least in float32, with the derivative 0 at 0."""
    gradients = [torch.view_as_real(g) if g.is_complex() else g for g in gradients]
    gradients = [g.float() if g.dtype in (torch.float16, torch.bfloat16) else g for g in gradients]
    squares = sum(g.flatten(1).square().sum(1) if g.dim() > 1 else g.square() for g in gradients)
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)


def rates_at(lr: float | Rates, names: Iterable[str], step: int) -> list[float | Tensor]:
    """The rates of one step, `[]` or of the parameter's own shape; one object where they are one."""
    if not isinstance(lr, Mapping):
        return [lr for _ in names]
    of_step: dict[int, Tensor] = {}  # by id
    found = []
    for name in names:
        rate = lr[name]
        if id(rate) not in of_step:
            of_step[id(rate)] = rate[min(step, len(rate) - 1)]
        found.append(of_step[id(rate)])
    return found


def adapting(named: Mapping[str, nn.Parameter], lr: float | Rates) -> list[str]:
    """Names of the parameters that an inner loop with these rates changes."""
    if isinstance(lr, Mapping):
        return [name for name in named if name in lr]
    return [name for name, p in named.items() if p.requires_grad]


def rate_of_steps(rate: Tensor, steps: int) -> Tensor:
    """`[steps, ...]` of a rate `[1|K, ...]`."""
    if steps <= len(rate):
        return rate[:steps]
    return torch.cat([rate, rate[-1:].expand(steps - len(rate), *rate.shape[1:])])
