"""Rates of an inner loop by parameter name.

*Rates* are a dict from the names of the parameters that adapt to tensors `[1, ...]` or `[K, ...]`: first the inner
step, then one element or the parameter's own shape. Steps beyond the last have the last one's rate. Whatever the dict
does not name is shared by all tasks, and trains through the inner loop without taking part in it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Rates = Mapping[str, Tensor]


def rate_of_steps(rate: Tensor, steps: int) -> Tensor:
    """`[steps, ...]` of a rate `[1|K, ...]`."""
    if steps <= len(rate):
        return rate[:steps]
    return torch.cat([rate, rate[-1:].expand(steps - len(rate), *rate.shape[1:])])


def stepped(fast: Mapping[str, Tensor], gradients: Mapping[str, Tensor], rates: Rates, step: int) -> dict[str, Tensor]:
    """The weights after one more step."""
    return {name: w - rates[name][min(step, len(rates[name]) - 1)] * gradients[name] for name, w in fast.items()}
