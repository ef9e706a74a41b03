"""CAML as in-context learning: a transformer reads the labelled support set beside a query, and says its class.

Two papers bear the name CAML. This is the one of 2024; that of 2019 is in `caml_conditional`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta import values

from ._arguments import check_width
from ._embedding import EmbeddingLearner


class Context(NamedTuple):
    """What `InContextCAML.adapt` returns: the support set as tokens, `[T, S, W]`, and N."""

    tokens: Tensor
    num_classes: int


class EncodedContext(NamedTuple):
    """What `adapt` returns with `query_in_context=False`: for every layer the keys and values of the support set that
    its queries attend to, `[T, heads, S, W / heads]` each, and N."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    num_classes: int


class InContextCAML(EmbeddingLearner):
    """Context-aware meta-learning (Fifty et al. 2024, "Context-Aware Meta-Learning", section 3).

    A support example is the token `[f(x), code of its label]`, a query `[f(x), unknown]`. A transformer without
    positions and without a causal mask reads the support tokens and one query; a linear layer on the query's output
    gives the logits. Labels have the frozen ELMES code: `max_ways` unit vectors with the same, widest possible angle
    between any two (`elmes`); its scale and the unknown token are learned.

    Args:
        encoder: any module from examples `[B, ...]` to embeddings `[B, D]`.
        features: D.
        max_ways: number of codes and logits. Tasks may have fewer classes, which use the first codes, but not more.
        code_width: of the label code, at least `max_ways`; the token's width is `features + code_width`.
        layers: of the transformer, pre-norm as in the paper.
        heads: of its attention; must divide the token's width.
        feedforward: width of its hidden layers.
        query_in_context: whether the support tokens see the query too, as in the paper: all of them are encoded again
            for every query. False: a support token sees the support set alone, a query the support set and itself. The
            support set is encoded once, by `adapt`, and all queries read that: `S + Q` tokens a task and not
            `Q * (S + 1)`. The weights have the same names and shapes, but train with what they are to be used with.
        ways: the most classes `N` that a task may have; None, the default, sets no limit. With
            `fastmeta.check_labels(False)` the number of every task's, labelled 0 to N - 1, and nothing waits for a GPU.

    Queries do not see each other: each has a sequence of its own, `T * Q` of them with `S + 1` tokens, as in the paper,
    or with `query_in_context=False` what comes of one in which the support set is masked from the query. The order of
    the support set does not matter. Which class has which number does, a little: the code is symmetric, but what reads
    it is learned.

    Departures: the encoder is trained with the rest and its embeddings pass through a layer norm, where the paper has a
    large pre-trained encoder that is frozen (give one with `requires_grad=False` for that); the transformer is small;
    a label's code starts with length `sqrt(code_width)`, entries of size 1 like the embedding's; attention starts with
    the same weights for queries and keys, so that what looks alike attends to each other from the first step.

    Raises:
        ValueError: widths that do not fit, more classes than `max_ways`, an encoder that does not return
            `[B, features]`, labels that do not fit. TypeError: labels that are not int64.
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        *,
        max_ways: int = 5,
        code_width: int = 64,
        layers: int = 2,
        heads: int = 8,
        feedforward: int = 256,
        query_in_context: bool = True,
        ways: int | None = None,
    ):
        super().__init__(encoder, ways)
        for name, value in (("features", features), ("max_ways", max_ways), ("code_width", code_width),
                            ("layers", layers), ("heads", heads), ("feedforward", feedforward)):  # fmt: skip
            values.count(name, value)
        if code_width < max_ways:
            raise ValueError(f"code_width must be at least max_ways = {max_ways}, got {code_width}")
        width = features + code_width
        if width % heads:
            raise ValueError(f"heads must divide features + code_width = {width}, got {heads}")
        self.features, self.max_ways = features, max_ways
        self.query_in_context = values.flag("query_in_context", query_in_context)
        self.norm = nn.LayerNorm(features)
        self.register_buffer("code", elmes(max_ways, code_width))
        self.code_scale = nn.Parameter(torch.tensor(float(code_width) ** 0.5))
        self.unknown = nn.Parameter(torch.zeros(code_width))
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        blocks = [nn.TransformerEncoderLayer(width, heads, feedforward, **options) for _ in range(layers)]
        with torch.no_grad():
            for block in blocks:  # queries and keys alike: attention begins as similarity
                block.self_attn.in_proj_weight[width : 2 * width] = block.self_attn.in_proj_weight[:width]
        self.transformer = nn.Sequential(*blocks, nn.LayerNorm(width))
        self.head = nn.Linear(width, max_ways, bias=False)

    def extra_repr(self) -> str:
        return (
            f"features={self.features}, max_ways={self.max_ways}, ways={self.ways}, "
            f"query_in_context={self.query_in_context}"
        )

    def _fit(self, features: Tensor, labels: Tensor, ways: int) -> Context | EncodedContext:
        if ways > self.max_ways:
            raise ValueError(f"ways must be at most max_ways = {self.max_ways}, got {ways}")
        codes = self.code_scale * self.code[labels]
        tokens = torch.cat([self._normed(features), codes.to(features.dtype)], 2)
        return Context(tokens, ways) if self.query_in_context else EncodedContext(self._encoded(tokens), ways)

    def _score(self, state: Context | EncodedContext, features: Tensor) -> Tensor:
        tasks, queries, _ = features.shape
        unknown = self.unknown.to(features.dtype).expand(tasks, queries, -1)
        query = torch.cat([self._normed(features), unknown], 2)
        if isinstance(state, EncodedContext):
            return self.head(self._read(state, query))[..., : state.num_classes]
        context = state.tokens.unsqueeze(1).expand(-1, queries, -1, -1)
        read = self.transformer(torch.cat([query.unsqueeze(2), context], 2).flatten(0, 1))
        return self.head(read[:, 0])[:, : state.num_classes].unflatten(0, (tasks, queries))

    def _num_tasks(self, state: Context | EncodedContext) -> int:
        return len(state.layers[0][0] if isinstance(state, EncodedContext) else state.tokens)

    def _encoded(self, tokens: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Keys and values of the support tokens `[T, S, W]` in every layer, none of which sees a query."""
        blocks, layers = self.transformer[:-1], []
        for block in blocks:
            query, key, value = _heads(block, tokens)
            layers.append((key, value))
            if len(layers) < len(blocks):  # nothing reads what comes out of the last one
                tokens = _after(block, tokens, F.scaled_dot_product_attention(query, key, value))
        return tuple(layers)

    def _read(self, state: EncodedContext, tokens: Tensor) -> Tensor:
        """What the query tokens `[T, Q, W]` become, each of which sees the support set and itself."""
        for block, (key, value) in zip(self.transformer[:-1], state.layers, strict=True):
            query, own_key, own_value = _heads(block, tokens)
            query = query * query.shape[-1] ** -0.5
            scores = torch.cat([query @ key.mT, (query * own_key).sum(-1, keepdim=True)], -1)
            weights = scores.softmax(-1).to(value.dtype)
            tokens = _after(block, tokens, weights[..., :-1] @ value + weights[..., -1:] * own_value)
        return self.transformer[-1](tokens)

    def _normed(self, features: Tensor) -> Tensor:
        check_width(features, self.features)
        return self.norm(features)


def _heads(block: nn.TransformerEncoderLayer, tokens: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values of tokens `[T, B, W]`, each `[T, heads, B, W / heads]`."""
    attention = block.self_attn
    mixed = F.linear(block.norm1(tokens), attention.in_proj_weight, attention.in_proj_bias)
    return mixed.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def _after(block: nn.TransformerEncoderLayer, tokens: Tensor, attended: Tensor) -> Tensor:
    """What comes out of a layer for tokens `[T, B, W]` whose attention gave `[T, heads, B, W / heads]`."""
    tokens = tokens + block.self_attn.out_proj(attended.transpose(1, 2).flatten(2))
    return tokens + block.linear2(block.activation(block.linear1(block.norm2(tokens))))


def elmes(classes: int, width: int, *, seed: int = 0) -> Tensor:
    """Equal-length, maximally equiangular vectors: `[classes, width]`, unit rows with inner products
    `-1 / (classes - 1)`, the corners of a regular simplex in a random orientation (Fifty et al. 2024, section 4).

    Args: classes: at least 1. width: at least `classes`. seed: of the orientation.
    """
    if not 1 <= classes <= width:
        raise ValueError(f"classes must lie between 1 and width = {width}, got {classes}")
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, classes, dtype=torch.float64, generator=generator))[0]
    if classes == 1:
        return basis.T.float()
    corners = torch.eye(classes, dtype=torch.float64) - 1 / classes
    return ((classes / (classes - 1)) ** 0.5 * corners @ basis.T).float()
