"""Embeddings."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.compat.torchmeta.modules.module import MetaModule


class MetaEmbedding(nn.Embedding, MetaModule):
    """`torch.nn.Embedding`; with a weight `[T, V, D]` it takes indices `[T, ...]`, and no `max_norm`."""

    def forward(self, input: Tensor, params: Mapping[str, Tensor] | None = None) -> Tensor:
        weight = self.weight if params is None else params["weight"]
        if weight.dim() == 2:
            return F.embedding(
                input,
                weight,
                self.padding_idx,
                self.max_norm,
                self.norm_type,
                self.scale_grad_by_freq,
                self.sparse,
            )
        if self.max_norm is not None:
            raise ValueError("max_norm, which changes the weights in place, does not go with weights of several tasks")
        tasks, words, width = weight.shape
        first = torch.arange(0, tasks * words, words, device=input.device).reshape(-1, *[1] * (input.dim() - 1))
        out = F.embedding(
            input + first,
            weight.reshape(tasks * words, width),
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )
        if self.padding_idx is None:
            return out
        # the padding's vector is used as it is, and gets no gradient
        return torch.where((input == self.padding_idx).unsqueeze(-1), out.detach(), out)


class MetaEmbeddingBag(nn.EmbeddingBag, MetaModule):
    """`torch.nn.EmbeddingBag`, without a task dimension."""

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        params: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        return F.embedding_bag(
            input,
            self.weight if params is None else params["weight"],
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
        )
