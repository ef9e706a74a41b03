"""CAML as in-context learning: a transformer reads the labelled support set beside a query, and says its class.

Two papers bear the name CAML. This is the one of 2024; that of 2019 is in `caml_conditional`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmeta import values

from ._arguments import check_width
from ._embedding import EmbeddingLearner


class Context(NamedTuple):
    """What `InContextCAML.adapt` returns: the support set as tokens, `[T, S, W]`, and N."""

    tokens: Tensor
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
        ways: the most classes `N` that a task may have; None, the default, sets no limit. With
            `fastmeta.check_labels(False)` the number of every task's, labelled 0 to N - 1, and nothing waits for a GPU.

    Queries do not see each other: each has a sequence of its own, `T * Q` of them with `S + 1` tokens, as in the paper.
    The order of the support set does not matter. Which class has which number does, a little: the code is symmetric,
    but what reads it is learned.

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
        return f"features={self.features}, max_ways={self.max_ways}, ways={self.ways}"

    def _fit(self, features: Tensor, labels: Tensor, ways: int) -> Context:
        if ways > self.max_ways:
            raise ValueError(f"ways must be at most max_ways = {self.max_ways}, got {ways}")
        codes = self.code_scale * self.code[labels]
        return Context(torch.cat([self._normed(features), codes.to(features.dtype)], 2), ways)

    def _score(self, state: Context, features: Tensor) -> Tensor:
        tasks, queries, _ = features.shape
        unknown = self.unknown.to(features.dtype).expand(tasks, queries, -1)
        query = torch.cat([self._normed(features), unknown], 2).unsqueeze(2)
        context = state.tokens.unsqueeze(1).expand(-1, queries, -1, -1)
        read = self.transformer(torch.cat([query, context], 2).flatten(0, 1))
        return self.head(read[:, 0])[:, : state.num_classes].unflatten(0, (tasks, queries))

    def _normed(self, features: Tensor) -> Tensor:
        check_width(features, self.features)
        return self.norm(features)


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
