"""Prototypes, distances and the losses on them: what embeddings of support and query rows go through."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta import values
from fastmeta.dispatch.backends import METRICS
from fastmeta.ops import class_prototypes as _class_prototypes
from fastmeta.ops import contrastive_loss as _contrastive_loss
from fastmeta.ops import pairwise_distance as _pairwise_distance
from fastmeta.ops import prototypical_loss as _prototypical_loss

from . import checks
from .autocast import cast


def class_prototypes(embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean embedding of each class of each task (Snell et al. 2017, equation 1).

    Args:
        embeddings: `[T, S, D]`, floating.
        labels: `[T, S]` int64 in [0, num_classes); classes may be unbalanced.
        num_classes: N.

    Returns:
        `[T, N, D]`, dtype of `embeddings`; zeros for a class without rows.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: a shape or device that does not fit, a label out of range.
    """
    key = checks.key("class_prototypes", embeddings, labels, num_classes)
    if not checks.passed(key):
        checks.tensor("embeddings", embeddings, "[T, S, D]")
        checks.labels("labels", labels, "[T, S]", embeddings, "embeddings")
        values.count("num_classes", num_classes, 0)
        checks.remember(key)
    (embeddings,) = cast(_class_prototypes.SPEC.autocast, embeddings)
    return _class_prototypes.SPEC(embeddings, labels, num_classes)


def pairwise_distance(query: Tensor, prototypes: Tensor, metric: str = "sqeuclidean") -> Tensor:
    """Distance of every query to every prototype of its task, without a `[T, Q, N, D]` intermediate.

    Args:
        query: `[T, Q, D]`, floating.
        prototypes: `[T, N, D]`, same dtype and device.
        metric: smaller is nearer under each. "sqeuclidean" `sum (q-p)^2` (default), "euclidean" its root, "cosine"
            `1 - q.p / (max(|q|, 1e-8) max(|p|, 1e-8))`, "dot" `-q.p`, "manhattan" `sum |q-p|`.

    Returns:
        `[T, Q, N]`. Under sqeuclidean, euclidean and manhattan never negative, exactly 0 for equal points, and there
        with gradient 0.

    Raises:
        TypeError: a dtype that is not allowed or differs.
        ValueError: a shape or device that does not fit, an unknown metric.
    """
    key = checks.key("pairwise_distance", query, prototypes, metric)
    known = checks.passed(key)
    if not known:
        checks.tensor("query", query, "[T, Q, D]")
        checks.tensor("prototypes", prototypes, "[T, N, D]")
        checks.same_size("prototypes", prototypes, 0, "T", "query", query.shape[0])
        checks.same_size("prototypes", prototypes, 2, "D", "query", query.shape[2])
        values.choice("metric", metric, METRICS)
    query, prototypes = cast(_pairwise_distance.SPEC.autocast, query, prototypes)
    if not known:
        checks.same_kind("query", query, prototypes=prototypes)
        checks.remember(key)
    return _pairwise_distance.SPEC(query, prototypes, metric)


def prototypical_loss(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    num_classes: int,
    metric: str = "sqeuclidean",
    *,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and accuracy of a Prototypical Network from its embeddings (Snell et al. 2017, algorithm 1), fused.

    Equal to `cross_entropy(-pairwise_distance(query, class_prototypes(support, ...)), query_labels)` per task, with
    nothing of size `[T, Q, N]` kept for the backward.

    Args:
        support: `[T, S, D]`, floating.
        support_labels: `[T, S]` int64 in [0, num_classes); classes may be unbalanced, an absent class has prototype 0.
        query: `[T, Q, D]`, same dtype and device.
        query_labels: `[T, Q]` int64 in [0, num_classes).
        num_classes: N.
        metric: as in `pairwise_distance`.
        weights: `[T]`, same dtype and device, may require a gradient: each task's loss is multiplied with its own,
            so that `loss.mean()` is their weighted mean. Default None, all 1.

    Returns:
        loss `[T]`, the mean over the task's queries times the task's weight, and accuracy `[T]` in [0, 1], which has no
        gradient. Both NaN where Q = 0.

    Raises:
        TypeError: a dtype that is not allowed or differs.
        ValueError: a shape or device that does not fit, an unknown metric, a label out of range.
    """
    key = checks.key(
        "prototypical_loss", support, support_labels, query, query_labels, num_classes, metric, weights
    )
    known = checks.passed(key)
    if not known:
        checks.tensor("support", support, "[T, S, D]")
        checks.tensor("query", query, "[T, Q, D]")
        checks.same_size("query", query, 0, "T", "support", support.shape[0])
        checks.same_size("query", query, 2, "D", "support", support.shape[2])
        checks.labels("support_labels", support_labels, "[T, S]", support, "support")
        checks.labels("query_labels", query_labels, "[T, Q]", query, "query")
        values.count("num_classes", num_classes, 0)
        values.choice("metric", metric, METRICS)
        checks.task_weights("weights", weights, "support", support)
    support, query, weights = cast(_prototypical_loss.SPEC.autocast, support, query, weights)
    if not known:
        checks.same_kind("support", support, query=query, weights=weights)
        checks.remember(key)
    loss, accuracy = _prototypical_loss.SPEC(
        support, support_labels, query, query_labels, num_classes, metric, weights=weights
    )
    return loss if weights is None else weights * loss, accuracy


def contrastive_loss(
    first: Tensor,
    second: Tensor,
    temperature: float = 0.5,
    *,
    normalise: bool = True,
    weights: Tensor | None = None,
) -> Tensor:
    """NT-Xent (Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations", equation 1):
    every embedding is to find the other view of its example among all embeddings of the batch.

    The mean over the 2 B embeddings of `logsumexp(s_ij, j != i) - s_i,partner`, where `s` is the cosine similarity over
    `temperature`, and nothing of size `[T, 2 B, 2 B]` is kept for the backward.

    Args:
        first: `[T, B, D]`, floating: one view of the B examples of T independent batches.
        second: `[T, B, D]`, same dtype and device: the other view of the same examples, in the same order.
        temperature: above 0. The paper's section 5.1 tries 0.05 to 1; 0.5 is its default for small images.
        normalise: divide embeddings by their Euclidean norm (of 1e-8 at least); False takes them as they come, and so
            dot products in place of cosines.
        weights: `[T]`, same dtype and device, may require a gradient: each batch's loss is multiplied with its
            own, so that `loss.mean()` is their weighted mean. Default None, all 1.

    Returns:
        loss `[T]`, times `weights`; 0 where B = 1, and NaN where B = 0.

    Raises:
        TypeError: a dtype that is not allowed or differs.
        ValueError: a shape or device that does not fit, a temperature that is not above 0.
    """
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not number or not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number above 0, got {values.shown(temperature)}")
    values.flag("normalise", normalise)
    checks.tensor("first", first, "[T, B, D]")
    checks.tensor("second", second, "[T, B, D]")
    for axis, name in enumerate("TBD"):
        checks.same_size("second", second, axis, name, "first", first.shape[axis])
    checks.task_weights("weights", weights, "first", first)
    first, second, weights = cast(_contrastive_loss.SPEC.autocast, first, second, weights)
    checks.same_kind("first", first, second=second, weights=weights)
    embeddings = torch.cat([first, second], 1)
    if normalise:
        # float16 has no 1e-8: a row of zeros would be divided by 0
        wide = embeddings.float() if embeddings.dtype == torch.float16 else embeddings
        embeddings = torch.nn.functional.normalize(wide, dim=-1, eps=1e-8).to(embeddings.dtype)
    loss = _contrastive_loss.SPEC(embeddings, float(temperature), weights=weights)
    return loss if weights is None else weights * loss
