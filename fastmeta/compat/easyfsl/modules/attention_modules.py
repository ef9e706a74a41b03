"""The attention of FEAT, with the parameters' names of its checkpoints."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class MultiHeadAttention(nn.Module):
    """Attention with a residual connection and a layer norm, `[B, L, d_model]` -> `[B, L, d_model]`.

    Args:
        n_head: heads.
        d_model: width of the rows.
        d_k, d_v: widths of a head's keys and values.
        dropout: of the output (default 0.1); the attention's own is 0.1.
        flag_norm: with the residual connection and the norm (default).
    """

    def __init__(self, n_head: int, d_model: int, d_k: int, d_v: int, dropout: float = 0.1, flag_norm: bool = True):
        super().__init__()
        self.n_head = n_head
        self.d_k = d_k
        self.d_v = d_v
        self.w_qs = nn.Linear(d_model, n_head * d_k, bias=False)
        self.w_ks = nn.Linear(d_model, n_head * d_k, bias=False)
        self.w_vs = nn.Linear(d_model, n_head * d_v, bias=False)
        for layer, width in ((self.w_qs, d_k), (self.w_ks, d_k), (self.w_vs, d_v)):
            nn.init.normal_(layer.weight, std=math.sqrt(2.0 / (d_model + width)))
        self.attention_dropout = nn.Dropout(0.1)
        self.layer_norm = nn.LayerNorm(d_model)
        self.fc = nn.Linear(n_head * d_v, d_model)
        nn.init.xavier_normal_(self.fc.weight)
        self.dropout = nn.Dropout(dropout)
        self.flag_norm = flag_norm

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and what it is before dropout, residual and norm."""
        queries, keys, values = (
            layer(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
            for layer, x in ((self.w_qs, q), (self.w_ks, k), (self.w_vs, v))
        )
        attention = (torch.matmul(queries, keys.mT) / math.sqrt(self.d_k)).softmax(-1)
        read = torch.matmul(self.attention_dropout(attention), values).transpose(1, 2).flatten(2)
        result = self.fc(read)
        output = self.dropout(result)
        return (self.layer_norm(output + q) if self.flag_norm else output), result
