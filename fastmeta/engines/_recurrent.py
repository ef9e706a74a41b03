"""`nn.LSTM`, `nn.GRU` and `nn.RNN` for all tasks at once: their steps written out.

`torch.func.vmap` cannot map torch's own recurrent kernels, and on a GPU cuDNN's have no second derivative. Written out,
a layer is one product of all time steps with its input weights and one small product a step with its recurrent ones;
mapped over tasks these are batched products, so that the number of operations does not grow with the tasks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# (gates of the input, gates of the state, state, cell) -> (state, cell)
Cell = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def _lstm_cell(given: Tensor, carried: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (given + carried).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru_cell(given: Tensor, carried: Tensor, h: Tensor, c: None) -> tuple[Tensor, None]:
    (r_x, z_x, n_x), (r_h, z_h, n_h) = given.chunk(3, -1), carried.chunk(3, -1)
    z = torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h)
    return n + z * (h - n), None


def _elman_cell(activation: Callable[[Tensor], Tensor]) -> Cell:
    return lambda given, carried, h, c: (activation(given + carried), None)


def _recurrent(cell: Cell, x: Tensor, states: tuple[Tensor, Tensor | None], weights: list[Tensor], has_biases: bool,
               layers: int, dropout: float, training: bool, bidirectional: bool, batch_first: bool):  # fmt: skip
    """What `torch.lstm`, `torch.gru`, `torch.rnn_tanh` and `torch.rnn_relu` compute of padded sequences."""
    directions = 2 if bidirectional else 1
    per_layer = len(weights) // (layers * directions)
    time = 1 if batch_first and x.dim() == 3 else 0
    h0, c0 = states
    last_h, last_c = [], []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            at = layer * directions + direction
            own = list(weights[at * per_layer : (at + 1) * per_layer])
            w_x, w_h = own[:2]
            b_x, b_h = own[2:4] if has_biases else (None, None)
            w_out = own[-1] if len(own) in (3, 5) else None  # of an LSTM with projections
            given = F.linear(x, w_x, b_x).unbind(time)
            h, c = h0[at], None if c0 is None else c0[at]
            steps = range(len(given) - 1, -1, -1) if direction else range(len(given))
            found: list[Tensor] = [h] * len(given)
            for step in steps:
                h, c = cell(given[step], F.linear(h, w_h, b_h), h, c)
                if w_out is not None:
                    h = F.linear(h, w_out)
                found[step] = h
            outputs.append(torch.stack(found, time))
            last_h.append(h)
            last_c.append(c)
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if dropout and training and layer < layers - 1:
            x = F.dropout(x, dropout)
    return x, torch.stack(last_h), None if c0 is None else torch.stack(last_c)


def _refuse_packed(second) -> None:
    if isinstance(second, Tensor) and second.dtype == torch.int64:
        raise NotImplementedError("a packed sequence has a length for each row, which torch.func cannot map over tasks")


def _lstm(x: Tensor, hx, *rest):
    _refuse_packed(hx)
    return _recurrent(_lstm_cell, x, tuple(hx), *rest)


def _with_one_state(cell: Cell):
    def run(x: Tensor, hx: Tensor, *rest):
        _refuse_packed(hx)
        return _recurrent(cell, x, (hx, None), *rest)[:2]

    return run


WRITTEN_OUT = {
    torch.lstm: _lstm,
    torch.gru: _with_one_state(_gru_cell),
    torch.rnn_tanh: _with_one_state(_elman_cell(torch.tanh)),
    torch.rnn_relu: _with_one_state(_elman_cell(torch.relu)),
}
