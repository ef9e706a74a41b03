"""Gradients of a function estimated from its values at points drawn around its arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ... import pytree
from ...typing import Numeric, Samplable, SampleFunc

SCALAR = torch.Size()
Method = Literal["naive", "forward", "antithetic"]


class WrappedSamplable(Samplable):
    """A function of a shape as something with `sample`."""

    def __init__(self, sample_fn: SampleFunc):
        self.sample_fn = sample_fn

    def sample(self, sample_shape: torch.Size = SCALAR) -> Tensor | Sequence[Numeric]:
        return self.sample_fn(sample_shape)


class _Estimated(torch.autograd.Function):
    """`value(tensors)`, whose backward is `gradient(tensors, output)` times what comes from above."""

    @staticmethod
    def forward(ctx: Any, value: Callable, gradient: Callable, *tensors: Tensor) -> Tensor:
        output = value(tensors)
        if not isinstance(output, Tensor):
            raise TypeError("`output` must be a tensor.")
        if output.dim() != 0:
            raise RuntimeError("`output` must be a scalar tensor.")
        ctx.gradient = gradient
        ctx.save_for_backward(*tensors, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        *tensors, output = ctx.saved_tensors
        return None, None, *(grad * g for g in ctx.gradient(tensors, output))


def zero_order(
    distribution: SampleFunc | Samplable,
    method: Method = "naive",
    argnums: int | tuple[int, ...] = (0,),
    num_samples: int = 1,
    sigma: float = 1.0,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """A decorator of `fn(*args) -> scalar` that gives it estimated gradients; what happens inside `fn` does not matter.

    The estimate is the mean over draws `n` of `n * d / sigma`, with `d` one of the three below.

    Args:
        distribution: where `n` comes from: what has `sample(sample_shape)`, or a function of the shape. It is to be
            symmetric, of variance 1.
        method: "naive", `d = fn(x + sigma n)`; "forward", `fn(x + sigma n) - fn(x)`; "antithetic",
            `(fn(x + sigma n) - fn(x - sigma n)) / 2`.
        argnums: which arguments, trees of tensors, have gradients.
        num_samples: draws a gradient.
        sigma: how far from the arguments the function is evaluated.

    Raises:
        TypeError: a `distribution` that cannot be sampled, or, when called, a result that is no tensor.
        RuntimeError: when called, a result that is no scalar.
    """
    assert method in ("naive", "forward", "antithetic"), f"no such method: {method!r}"
    if not isinstance(distribution, Samplable):
        if not callable(distribution):
            raise TypeError("`distribution` must be a callable or an instance of `Samplable`.")
        distribution = WrappedSamplable(distribution)
    argnums = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    def decorate(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(fn)
        def apply(*args: Any, **kwargs: Any) -> Tensor:
            leaves, structure = pytree.tree_flatten([args[i] for i in argnums])

            def value(tensors: Sequence[Tensor]) -> Tensor:
                here = list(args)
                for i, arg in zip(argnums, pytree.tree_unflatten(structure, tensors), strict=True):
                    here[i] = arg
                return fn(*here, **kwargs)

            def difference(tensors: Sequence[Tensor], noises: list, output: Tensor) -> Tensor:
                above = value([t + sigma * n for t, n in zip(tensors, noises, strict=True)])
                if method == "naive":
                    return above
                if method == "forward":
                    return above - output
                return (above - value([t - sigma * n for t, n in zip(tensors, noises, strict=True)])) / 2

            def gradient(tensors: Sequence[Tensor], output: Tensor) -> list[Tensor]:
                total = [torch.zeros_like(t) for t in tensors]
                for _ in range(num_samples):
                    noises = [distribution.sample(sample_shape=t.shape) for t in tensors]
                    weight = difference(tensors, noises, output) / (sigma * num_samples)
                    total = [g + weight * n for g, n in zip(total, noises, strict=True)]
                return total

            return _Estimated.apply(value, gradient, *leaves)

        return apply

    return decorate
