"""Attention."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.compat.torchmeta.modules.linear import MetaLinear
from fastmeta.compat.torchmeta.modules.module import MetaModule


class MetaMultiheadAttention(nn.MultiheadAttention, MetaModule):
    """`torch.nn.MultiheadAttention`, whose last projection starts as a `MetaLinear` does.

    With parameters of several tasks, query, key and value of four dimensions are the tasks' own, `[T, L, B, E]`, and
    those of three are shared; masks are shared.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.out_proj = MetaLinear(
            self.embed_dim,
            self.embed_dim,
            bias=kwargs.get("bias", True),
            device=kwargs.get("device"),
            dtype=kwargs.get("dtype"),
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        params: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        own = OrderedDict(self.named_parameters())
        params = own if params is None else {name: params[name] for name in own if name in params}
        options = (key_padding_mask, need_weights, attn_mask)
        mapped = {name: 0 if value.dim() > own[name].dim() else None for name, value in params.items()}
        if not any(dim == 0 for dim in mapped.values()):
            return self._attend(query, key, value, params, *options)

        def one_task(query, key, value, params):
            attended, weights = self._attend(query, key, value, params, *options)
            return (attended, weights) if need_weights else (attended,)

        inputs = [0 if x.dim() == 4 else None for x in (query, key, value)]
        attended, *weights = torch.func.vmap(one_task, (*inputs, mapped), randomness="different")(
            query, key, value, params
        )
        return attended, weights[0] if weights else None

    def _attend(self, query, key, value, params, key_padding_mask, need_weights, attn_mask):
        batch_first = self.batch_first and query.dim() == 3
        if batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        projections = {}
        if not self._qkv_same_embed_dim:
            projections = {name: params[name] for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")}
        attended, weights = F.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            params.get("in_proj_weight"),
            params.get("in_proj_bias"),
            params.get("bias_k"),
            params.get("bias_v"),
            self.add_zero_attn,
            self.dropout,
            params["out_proj.weight"],
            params.get("out_proj.bias"),
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=bool(projections),
            **projections,
        )
        return (attended.transpose(0, 1) if batch_first else attended), weights
