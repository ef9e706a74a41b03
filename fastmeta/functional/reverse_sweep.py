"""The gradient of a loss after K inner steps, found with the graph of one step at a time.

With `g` the gradient of the inner loss, a step is

    M^{k+1} = mu M^k + g(W^k) + d W^k,    W^{k+1} = W^k - lr_k M^{k+1}

The steps run without a graph, and their weights are kept. Let `V` be the outer loss's gradient with respect to
`W^{k+1}`, and `U` that with respect to `M^{k+1}` by way of later steps. Then, for k = K-1 down to 0, with `H` the
Hessian of the inner loss at `W^k` and `theta` whatever else that loss depends on,

    R = U - lr_k V,    d lr_k -= <V, M^{k+1}>,    d theta += (dg/dtheta)^T R,    V <- V + d R + H R,    U <- mu R

`H R` and `(dg/dtheta)^T R` are one gradient of `<g, R>`: plain autograd, so it follows whatever autograd does. In first
order `g` counts as a constant, and both are nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .run_again import RefuseStaleWeights
from .second_order import differentiate, twice_differentiable

Weights = list[Tensor]


class Swept(NamedTuple):
    """What a sweep finds, tensors in the order of those given."""

    gradients: list[Tensor]  # with respect to the weights before the first step
    rate_gradients: list[tuple[Tensor, Tensor]]  # (rate, its gradient) for each that requires one
    also_gradients: list[Tensor | None]  # None where nothing depends on it
    reached: list[bool]  # whether anything depends on these weights; else their gradient is 0


class InnerLoop:
    """K steps of gradient descent, and the way back through them.

    Args:
        loss: `loss(weights, k)`, the scalar that step `k` descends. Several tasks at once may be the sum of their
            losses: each of their weights `[T, *shape]` meets its own task's loss alone.
        rates: for each step, a rate for each weight: a float, or a tensor that broadcasts against it, of its dtype. A
            rate that is the same tensor in several places gets the sum of their gradients.
        momentum, weight_decay: `mu` and `d`.
        first_order: whether the inner gradients count as constants.
        every: the weights before each `every`-th step are kept, those between are computed once more.
        preserve_rng_state: whether a step that runs again draws the random numbers that it drew the first time.
        clip: `clip(gradients)`, what a step takes in their place, differentiably; None where there is no gradient.
        allow_unused: whether a loss may depend on none of the weights.
        name: what errors call the inner loss.
    """

    def __init__(
        self,
        loss: Callable[[Weights, int], Tensor],
        rates: Sequence[Sequence[float | Tensor]],
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        first_order: bool = False,
        every: int = 1,
        preserve_rng_state: bool = True,
        clip: Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]] | None = None,
        allow_unused: bool = False,
        name: str = "inner_loss",
    ):
        self.loss, self.rates = loss, rates
        self.momentum, self.weight_decay = momentum, weight_decay
        self.first_order, self.every, self.preserve_rng_state = first_order, every, preserve_rng_state
        self.clip, self.allow_unused, self.name = clip, allow_unused, name
        self.losses: list[Tensor] = []  # of each step, `[]`
        self._kept: list[_State] = []
        self._random: list[RandomState] = []
        self._reached: list[bool] = []

    def adapt(self, weights: Weights, *, sweep: bool = True) -> Weights:
        """The weights after all steps; `sweep`: whether `sweep` is to follow."""
        learned = any(_requires_grad(rate) for rates in self.rates for rate in rates)
        keep = sweep and (learned or not self.first_order)  # else no step has to be seen again
        state = _State([w.detach() for w in weights], None)
        devices = sorted({w.device.index for w in weights if w.is_cuda})
        for step in range(len(self.rates)):
            if keep:
                if step % self.every == 0:
                    momenta_too = learned or self.every > 1
                    self._kept.append(state if momenta_too else state._replace(momenta=None))
                if self.preserve_rng_state:
                    self._random.append(RandomState(devices))
            state, loss = self._step(state, step)
            self.losses.append(loss)
        return state.weights

    def outer_gradient(
        self, loss: Callable[[Weights], Tensor], weights: Weights, also: Sequence[Tensor]
    ) -> tuple[Tensor, Weights, list[Tensor | None]]:
        """An outer loss of adapted weights, and what `sweep` takes: its gradients for the weights and for `also`. Of
        several groups of tasks, one after the other, the weights' gradients join and the others add up."""
        leaves = _leaves(weights)
        with RefuseStaleWeights():
            value = loss(leaves)
        found = self._gradients("outer_loss", value, leaves, also)
        reached = [g is not None for g in found[: len(leaves)]]
        self._reached = [a or b for a, b in zip(self._reached, reached, strict=True)] if self._reached else reached
        own = [torch.zeros_like(w) if g is None else g for w, g in zip(leaves, found, strict=False)]
        return value.detach(), own, list(found[len(leaves) :])

    def sweep(self, adjoint: Weights, also: Sequence[Tensor], also_adjoint: Sequence[Tensor | None]) -> Swept:
        """Hands gradients with respect to the adapted weights, and to what the outer loss depends on beside them, back
        through the steps. It can be done once: what was kept is let go on the way."""
        way_back = _WayBack(list(adjoint), also, list(also_adjoint))
        again: dict[int, Tensor] = {}
        with self._random_numbers_as_before():
            for step, state in self._states_backwards():
                again[step] = self._step_back(way_back, state, step)
        self._check_pure(again, adjoint)
        return Swept(way_back.v, list(way_back.rates.values()), way_back.also_v, self._reached)

    def _step(self, state: _State, step: int) -> tuple[_State, Tensor]:
        with self._exact(state.weights):
            loss, _, gradients = self._gradient(state.weights, step, create_graph=False)
        with torch.no_grad():
            momenta = self._momenta(state, gradients)
            weights = [
                torch.addcmul(w, m, rate.detach(), value=-1) if isinstance(rate, Tensor) else w.sub(m, alpha=rate)
                for w, m, rate in zip(state.weights, momenta, self.rates[step], strict=True)
            ]
        return _State(weights, momenta if self.momentum else None), loss

    def _momenta(self, state: _State, gradients: Sequence[Tensor | None]) -> Weights:
        momenta = [torch.zeros_like(w) if g is None else g for g, w in zip(gradients, state.weights, strict=True)]
        if self.weight_decay:
            momenta = [m.add(w, alpha=self.weight_decay) for m, w in zip(momenta, state.weights, strict=True)]
        if state.momenta is not None:
            momenta = [m.add(last, alpha=self.momentum) for m, last in zip(momenta, state.momenta, strict=True)]
        return momenta

    def _gradient(self, weights: Weights, step: int, *, create_graph: bool):
        """The inner loss, the leaves that it was given, and its gradients, None where it does not depend on one."""
        leaves = _leaves(weights)
        with RefuseStaleWeights():
            loss = self.loss(leaves, step)
        gradients = self._gradients(self.name, loss, leaves, (), create_graph=create_graph)
        if self.clip is not None:
            gradients = self.clip(gradients)
        torch.clear_autocast_cache()  # it would hold a copy of every step's weights
        return loss.detach(), leaves, gradients

    def _gradients(self, name: str, loss: Tensor, weights: Weights, also: Sequence[Tensor], **options):
        """For `weights` and `also`, None where `loss` does not depend on one."""
        inputs = [*weights, *also]
        found: Sequence[Tensor | None] = (None,) * len(inputs)
        if loss.requires_grad and inputs:
            found = differentiate(loss, inputs, allow_unused=True, **options)
        if not self.allow_unused and all(gradient is None for gradient in found[: len(weights)]):
            raise ValueError(
                f"{name} does not depend on the parameters that it is given: it must use these, and not the model's "
                "own, as torch.func.functional_call(model, params, args) does"
            )
        return found

    def _exact(self, weights: Weights):
        # in both passes: other kernels would round differently and draw other random numbers
        return nullcontext() if self.first_order else twice_differentiable(any(w.is_cuda for w in weights))

    def _states_backwards(self) -> Iterator[tuple[int, _State | None]]:
        steps = len(self.rates)
        if not self._kept:
            yield from ((step, None) for step in reversed(range(steps)))
        while self._kept:
            first = (len(self._kept) - 1) * self.every
            states = [self._kept.pop()]
            for step in range(first, min(first + self.every, steps) - 1):
                self._restore_random(step)
                states.append(self._step(states[-1], step)[0])
            while states:
                yield first + len(states) - 1, states.pop()

    def _step_back(self, way_back: _WayBack, state: _State | None, step: int) -> Tensor | None:
        """One step of the recursion above; the inner loss, if it had to be computed."""
        rates = self.rates[step]
        with torch.no_grad():
            r = [-rate * v for rate, v in zip(rates, way_back.v, strict=True)]
            if way_back.u is not None:
                r = [a + u for a, u in zip(r, way_back.u, strict=True)]
        loss, hessian_r = None, [None] * len(r)
        if state is not None:
            self._restore_random(step)
            with self._exact(state.weights):
                loss, leaves, gradients = self._gradient(state.weights, step, create_graph=not self.first_order)
                if not self.first_order:
                    hessian_r = way_back.add_second_derivatives(gradients, leaves, r)
                    self._reached = [a or h is not None for a, h in zip(self._reached, hessian_r, strict=True)]
            if any(map(_requires_grad, rates)):
                with torch.no_grad():
                    way_back.add_rate_gradients(rates, self._momenta(state, gradients))
        with torch.no_grad():
            way_back.v = [v if h is None else v + h for v, h in zip(way_back.v, hessian_r, strict=True)]
            if self.weight_decay:
                way_back.v = [v.add(a, alpha=self.weight_decay) for v, a in zip(way_back.v, r, strict=True)]
            if self.momentum:
                way_back.u = [self.momentum * a for a in r]
        return loss

    def _restore_random(self, step: int) -> None:
        if self.preserve_rng_state:
            self._random[step].restore()

    @contextmanager
    def _random_numbers_as_before(self) -> Iterator[None]:
        """What runs again leaves the generators where they are."""
        before = RandomState(self._random[0].devices) if self._random else None
        try:
            yield
        finally:
            if before is not None:
                before.restore()

    def _check_pure(self, again: dict[int, Tensor | None], weights: Weights) -> None:
        steps = [step for step, loss in again.items() if loss is not None]
        if not steps:
            return
        pairs = torch.stack([torch.stack((self.losses[step], again[step])) for step in steps])
        # Half the digits: on a GPU some sums are not the same twice, other data give another loss.
        allowed = max(torch.finfo(t.dtype).eps for t in (pairs, *weights)) ** 0.5
        for step, (first, second) in zip(steps, pairs.tolist(), strict=True):
            if abs(first - second) > allowed * max(abs(first), abs(second), 0.01):
                raise ChangedAgain(
                    f"{self.name} must give the same again when it is called again: in step {step} it was {first:.9g}, "
                    f"then {second:.9g}. The data must be fixed (draw and augment them before), buffers must not "
                    "change what it gives (spectral norm in train mode does), and random numbers must come from "
                    "torch's own generators" + ("" if self.preserve_rng_state else " with preserve_rng_state=True")
                )


class ChangedAgain(RuntimeError):
    """An inner loss gave something else when it was called again."""


class _State(NamedTuple):
    """Before a step."""

    weights: Weights
    momenta: Weights | None  # none before the first step, and without momentum


class RandomState:
    """Of torch's own generators, on the CPU and on those CUDA devices."""

    def __init__(self, devices: list[int]):
        self.devices = devices
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(device) for device in devices]

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in zip(self.devices, self.cuda, strict=True):
            torch.cuda.set_rng_state(state, device)


@dataclass
class _WayBack:
    """The adjoints on the way back."""

    v: Weights
    also: Sequence[Tensor]
    also_v: list[Tensor | None]
    u: Weights | None = None
    rates: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # by id

    def add_second_derivatives(self, gradients, leaves: Weights, r: Weights) -> list[Tensor | None]:
        """The gradient of `<g, R>`: that with respect to the weights is returned, that of all else is added up."""
        pairs = [(g, a) for g, a in zip(gradients, r, strict=True) if g is not None and g.requires_grad]
        if not pairs:  # a linear loss
            return [None] * len(leaves)
        outputs, along = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, [*leaves, *self.also], grad_outputs=along, allow_unused=True)
        with torch.no_grad():
            self.also_v = [total(*both) for both in zip(self.also_v, found[len(leaves) :], strict=True)]
        return list(found[: len(leaves)])

    def add_rate_gradients(self, rates: Sequence[float | Tensor], momenta: Weights) -> None:
        for rate, v, m in zip(rates, self.v, momenta, strict=True):
            if _requires_grad(rate):
                so_far = self.rates[id(rate)][1] if id(rate) in self.rates else None
                self.rates[id(rate)] = rate, total(so_far, -(v * m).sum_to_size(rate.shape))


def _leaves(weights: Weights) -> Weights:
    return [w.detach().requires_grad_() for w in weights]


def total(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _requires_grad(rate: float | Tensor) -> bool:
    return isinstance(rate, Tensor) and rate.requires_grad
