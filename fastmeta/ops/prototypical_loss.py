"""The loss of a Prototypical Network, from embeddings to a number per task:

    p = class means of the support set,   d[q, n] = distance(query q, p[n])
    loss = mean over q of  d[q, y_q] + logsumexp_n(-d[q, n]),   accuracy = mean over q of  [argmin_n d[q, n] = y_q]

Distances and probabilities of a query live only while its row is worked on: nothing of size `[T, Q, N]` is kept, the
backward forms them again. An absent class has the zero vector as its prototype; no queries give NaN, as the mean of
nothing does; of equal distances the first counts as nearest, and where one is NaN,
none does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.dispatch.backends import METRICS
from fastmeta.dispatch.derivation import derive_backward, vjp_of_reference
from fastmeta.dispatch.labels import label_range
from fastmeta.dispatch.library import Op, register
from fastmeta.dispatch.spec import Make, Sample, Workload
from fastmeta.ops import class_prototypes, pairwise_distance


def reference(
    support: Tensor, support_labels: Tensor, query: Tensor, query_labels: Tensor, num_classes: int, metric: str
) -> tuple[Tensor, Tensor]:
    prototypes = class_prototypes.reference(support, support_labels, num_classes)
    logits = -pairwise_distance.reference(query, prototypes, metric)
    if num_classes == 0:  # then there are no queries either: a label would be out of range
        empty = logits.sum(-1).mean(-1)
        return empty, empty.detach().clone()
    log_probs = torch.log_softmax(logits, -1)
    loss = -log_probs.gather(-1, query_labels.unsqueeze(-1)).squeeze(-1).mean(-1)
    classes = torch.arange(num_classes, device=logits.device)
    nearest = torch.where(logits == logits.amax(-1, keepdim=True), classes, num_classes).amin(
        -1
    )  # argmax: any of equals
    accuracy = (nearest == query_labels).to(loss.dtype).mean(-1)
    return loss, accuracy


def fake(support, support_labels, query, query_labels, num_classes, metric):
    return support.new_empty(support.shape[0]), support.new_empty(support.shape[0])


def check(support, support_labels, query, query_labels, num_classes, metric) -> None:
    label_range("support_labels", support_labels, num_classes)
    label_range("query_labels", query_labels, num_classes)


def backward(args, grads, needs):
    return BACKWARD(grads[0], *args, needs)


# (T, S, Q, N, D): sizes of 0 and 1, odd sizes, an absent class
SIZES = (
    (2, 5, 6, 3, 4),
    (1, 1, 1, 1, 1),
    (3, 31, 9, 30, 17),
    (2, 15, 63, 5, 129),
    (0, 4, 4, 2, 3),
    (2, 4, 0, 3, 4),
    (2, 0, 4, 3, 4),
    (2, 4, 4, 3, 0),
    (2, 0, 0, 0, 3),
)


def _inputs(make: Make, t, s, q, n, d):
    # small embeddings: distances of D = 129 would otherwise saturate the softmax and test nothing
    scale = max(d, 1) ** -0.5
    # the last class absent, no other: two absent classes lie at the same point, and rounding would pick the nearer
    order = torch.rand(t, s, generator=make.generator).argsort(-1)
    return (
        make.normal(t, s, d, scale=scale),
        (order % max(n - 1, 1)).to(make.device),
        make.normal(t, q, d, scale=scale),
        make.labels(n, t, q),
        n,
    )


def samples(make: Make):
    for metric in METRICS:
        for t, s, q, n, d in SIZES:
            yield Sample(f"{metric}-T{t}-S{s}-Q{q}-N{n}-D{d}", (*_inputs(make, t, s, q, n, d), metric))


def backward_samples(make: Make):
    for metric in METRICS:
        for t, s, q, n, d in SIZES:
            needs = 3 if (t, s, q, n, d) != SIZES[2] else 2
            args = (make.normal(t), *_inputs(make, t, s, q, n, d), metric, needs)
            yield Sample(f"{metric}-T{t}-S{s}-Q{q}-N{n}-D{d}-needs{needs}", args)


def workloads(make: Make):
    for t, n, shot, per_class, d in ((64, 20, 5, 15, 64), (16, 20, 5, 15, 1600)):
        support, query = make.normal(t, n * shot, d), make.normal(t, n * per_class, d)
        labels = make.balanced_labels(t, n, shot), make.balanced_labels(t, n, per_class)
        yield Workload(
            f"T{t}-N{n}-{shot}shot-{per_class}query-D{d}",
            (support, labels[0], query, labels[1], n, "sqeuclidean"),
            flops=2 * t * n * n * per_class * d,
            bytes=support.element_size() * t * n * (shot + per_class) * d,
        )


SPEC = register(
    Op(
        name="prototypical_loss",
        arguments="Tensor support, Tensor support_labels, Tensor query, Tensor query_labels, int num_classes, "
        "str metric",
        returns="(Tensor, Tensor)",
        summary="prototypes, distances, log-softmax and negative log-likelihood in one pass",
        reference=reference,
        fake=fake,
        differentiable=("support", "query"),
        differentiable_outputs=1,
        with_gradient=True,
        per_task=True,
        backward=backward,
        samples=samples,
        workloads=workloads,
        check=check,
        source="Snell et al. 2017, algorithm 1",
    )
)
_DERIVED = derive_backward(SPEC)
BACKWARD = register(Op(**_DERIVED, backward=lambda *a: vjp_of_reference(BACKWARD)(*a), samples=backward_samples))
