"""A module that is a loss, whose gradients are estimated from its values."""

from __future__ import annotations

import abc
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...._stateless import reparametrize
from ....typing import Numeric, Samplable
from ..decorator import SCALAR, Method, zero_order

__all__ = ["ZeroOrderGradientModule"]


class ZeroOrderGradientModule(nn.Module, Samplable):
    """A subclass defines `forward`, which gives a scalar, and `sample(sample_shape)`, where the draws come from.
    `class Loss(ZeroOrderGradientModule, method=, num_samples=, sigma=)` are the options of `torchopt.diff.zero_order`.
    """

    def __init_subclass__(cls, method: Method = "naive", num_samples: int = 1, sigma: float = 1.0) -> None:
        super().__init_subclass__()
        enable_zero_order_gradients(cls, method, num_samples, sigma)

    @abc.abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    @abc.abstractmethod
    def sample(self, sample_shape: torch.Size = SCALAR) -> Tensor | Sequence[Numeric]:
        """Draws of that shape."""
        raise NotImplementedError


def enable_zero_order_gradients(
    cls: type[ZeroOrderGradientModule], method: Method = "naive", num_samples: int = 1, sigma: float = 1.0
) -> type[ZeroOrderGradientModule]:
    """Makes `forward` of a class one whose gradients with respect to the parameters are estimated."""
    forward = cls.forward
    if getattr(forward, "__zero_order_gradients_enabled__", False):
        raise TypeError("Zero-order gradient estimation is already enabled for the `forward` method.")

    @functools.wraps(forward)
    def wrapped(self: ZeroOrderGradientModule, *input: Any, **kwargs: Any) -> Tensor:
        named = dict(self.named_parameters())
        if not named:
            raise RuntimeError("The module has no parameters.")

        @zero_order(self.sample, method, 0, num_samples, sigma)
        def loss(params: tuple[Tensor, ...], *input: Any, **kwargs: Any) -> Tensor:
            with reparametrize(self, zip(named, params, strict=True)):
                return forward(self, *input, **kwargs)

        return loss(tuple(named.values()), *input, **kwargs)

    wrapped.__zero_order_gradients_enabled__ = True
    cls.forward = wrapped
    return cls
