"""Matching networks: classes by the cosine similarity to each example of the support set (Vinyals et al. 2016).

Classes stand in the second dimension, `[T, C, Q]`. There is no temperature, and a class without examples has the
log-probability minus infinity.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["matching_log_probas", "matching_loss", "matching_probas", "pairwise_cosine_similarity"]


def pairwise_cosine_similarity(embeddings1: Tensor, embeddings2: Tensor, eps: float = 1e-8) -> Tensor:
    """`x1.x2 / max(|x1| |x2|, eps)` of all pairs: `[T, N, D]` and `[T, M, D]` -> `[T, N, M]`. It is the product of the
    norms that `eps` (default 1e-8) bounds, not each of them."""
    squares1 = embeddings1.square().sum(2, keepdim=True)
    squares2 = embeddings2.square().sum(2).unsqueeze(1)
    inverse = (squares1 * squares2).clamp(min=eps**2).rsqrt()
    return torch.bmm(embeddings1, embeddings2.transpose(1, 2)) * inverse


def matching_log_probas(
    embeddings: Tensor, targets: Tensor, test_embeddings: Tensor, num_classes: int, eps: float = 1e-8
) -> Tensor:
    """Log-probabilities of the classes of queries.

    Args:
        embeddings: `[T, S, D]`, of the support set.
        targets: `[T, S]` int64 in [0, num_classes).
        test_embeddings: `[T, Q, D]`, of the queries.
        num_classes: C.
        eps: as in `pairwise_cosine_similarity`.

    Returns:
        `[T, C, Q]`.
    """
    similarities = pairwise_cosine_similarity(embeddings, test_embeddings, eps=eps)
    highest = similarities.amax(1, keepdim=True).detach()
    attention = (similarities - highest).exp()
    of_class = attention.new_zeros(attention.shape[0], num_classes, attention.shape[2])
    of_class = of_class.scatter_add(1, targets.unsqueeze(-1).expand_as(attention), attention)
    return of_class.log() + highest - similarities.logsumexp(1, keepdim=True)


def matching_probas(
    embeddings: Tensor, targets: Tensor, test_embeddings: Tensor, num_classes: int, eps: float = 1e-8
) -> Tensor:
    """`matching_log_probas` as probabilities, `[T, C, Q]`; 0 for a class without examples."""
    return matching_log_probas(embeddings, targets, test_embeddings, num_classes, eps=eps).exp()


def matching_loss(
    train_embeddings: Tensor,
    train_targets: Tensor,
    test_embeddings: Tensor,
    test_targets: Tensor,
    num_classes: int,
    eps: float = 1e-8,
    **kwargs,
) -> Tensor:
    """Negative log-likelihood of the queries' classes `[T, Q]`; `kwargs` are those of `torch.nn.functional.nll_loss`.
    The others are those of `matching_log_probas`."""
    log_probas = matching_log_probas(train_embeddings, train_targets, test_embeddings, num_classes, eps=eps)
    return F.nll_loss(log_probas, test_targets, **kwargs)
