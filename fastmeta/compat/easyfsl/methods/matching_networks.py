"""Matching networks with full context (Vinyals et al. 2016)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from fastmeta.compat.easyfsl.methods.few_shot_classifier import FewShotClassifier
from fastmeta.compat.easyfsl.modules.predesigned_modules import (
    default_matching_networks_query_encoder,
    default_matching_networks_support_encoder,
)


class MatchingNetworks(FewShotClassifier):
    """Log-probabilities (so train with `nll_loss`) by attention to the support set, whose features a bidirectional
    LSTM puts into context, as an LSTM cell does those of the queries.

    Args:
        feature_dimension: D, of the backbone's features.
        support_encoder: `[1, S, D]` -> `([1, S, 2 D], ...)`; default an LSTM.
        query_encoder: `([Q, 2 D], ([Q, D], [Q, D]))` -> `([Q, D], [Q, D])`; default an LSTM cell.
    """

    def __init__(
        self,
        *args,
        feature_dimension: int,
        support_encoder: nn.Module | None = None,
        query_encoder: nn.Module | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.feature_dimension = feature_dimension
        self.support_features_encoder = support_encoder or default_matching_networks_support_encoder(feature_dimension)
        self.query_features_encoding_cell = query_encoder or default_matching_networks_query_encoder(feature_dimension)
        self.softmax = nn.Softmax(dim=1)
        self.contextualized_support_features = torch.tensor(())
        self.one_hot_support_labels = torch.tensor(())

    def process_support_set(self, support_images: Tensor, support_labels: Tensor) -> None:
        support_features = self.compute_features(support_images)
        self._validate_features_shape(support_features)
        self.contextualized_support_features = self.encode_support_features(support_features)
        self.one_hot_support_labels = one_hot(support_labels).to(support_features.dtype)

    def forward(self, query_images: Tensor) -> Tensor:
        query_features = self.compute_features(query_images)
        self._validate_features_shape(query_features)
        queries = self.encode_query_features(query_features)
        # the queries keep their length, as in the authors' code: the softmax would be flat without
        attention = self.softmax(queries.mm(normalize(self.contextualized_support_features).T))
        log_probabilities = (attention.mm(self.one_hot_support_labels) + 1e-6).log()
        return self.softmax_if_specified(log_probabilities)

    def encode_support_features(self, support_features: Tensor) -> Tensor:
        """`[S, D]`: the features plus both directions of the encoder."""
        context = self.support_features_encoder(support_features.unsqueeze(0))[0].squeeze(0)
        return support_features + context[:, : self.feature_dimension] + context[:, self.feature_dimension :]

    def encode_query_features(self, query_features: Tensor) -> Tensor:
        """`[Q, D]`: the features after as many reads of the support set as it has examples."""
        support = self.contextualized_support_features
        hidden, cell = query_features, torch.zeros_like(query_features)
        for _ in range(len(support)):
            read = self.softmax(hidden.mm(support.T)).mm(support)
            hidden, cell = self.query_features_encoding_cell(torch.cat((query_features, read), 1), (hidden, cell))
            hidden = hidden + query_features
        return hidden

    def _validate_features_shape(self, features: Tensor) -> None:
        self._raise_error_if_features_are_multi_dimensional(features)
        if features.shape[1] != self.feature_dimension:
            raise ValueError(f"features must be {self.feature_dimension} wide, got {features.shape[1]}")

    @staticmethod
    def is_transductive() -> bool:
        return False
