"""Weights and biases of all layers to flat states `[T, P]`, each row of a weight with its bias behind it, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.kernels._common import leading_size


def pack(weights: list[Tensor], biases: list[Tensor], first: Tensor | None = None) -> Tensor:
    """`[T, O, I]`, `[T, O]` of each layer -> `[T, P]`, `[1, P]` where all tasks share all of them.

    first: the state's part before, `[T, ...]`, that of the first layer in the Gram form.
    """
    parts = [] if first is None else [first.flatten(1)]
    for layer, weight in enumerate(weights):
        if biases:
            bias = biases[layer].unsqueeze(2)
            tasks = leading_size([weight, bias])
            weight = torch.cat([weight.expand(tasks, -1, -1), bias.expand(tasks, -1, -1)], 2)
        parts.append(weight.flatten(1))
    tasks = leading_size(parts)
    return torch.cat([part.expand(tasks, -1) for part in parts], 1)


def unpack(states: Tensor, weights: list[Tensor], biases: list[Tensor], first: int = 0):
    """What `pack` made `states` `[T, P]` of, in tensors of their own; first: elements of the part before."""
    found_weights, found_biases, at = [], [], first
    for weight in weights:
        out, width = weight.shape[1:]
        columns = width + bool(biases)
        rows = states[:, at : at + out * columns].view(states.shape[0], out, columns)
        found_weights.append(rows[:, :, :width].contiguous())
        if biases:
            found_biases.append(rows[:, :, width].contiguous())
        at += out * columns
    return found_weights, found_biases
