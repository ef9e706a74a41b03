"""Distances of every query to every prototype of its task, smaller is nearer under each metric:

    sqeuclidean  sum_d (q_d - p_d)^2            cosine     1 - q.p / (max(|q|, eps) max(|p|, eps))
    euclidean    sqrt of it                     dot        -q.p
    manhattan    sum_d |q_d - p_d|

Equal points have distance exactly 0 and no rounding makes a distance negative: distances are taken from differences, or
where they cancel from products formed anew from those. At distance 0 the gradients of euclidean and manhattan are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.dispatch.backends import METRICS
from fastmeta.dispatch.derivation import derive_backward, vjp_of_reference
from fastmeta.dispatch.library import Op, register
from fastmeta.dispatch.spec import Make, Sample, Workload

EPS = 1e-8  # as torch.nn.functional.cosine_similarity


def reference(query: Tensor, prototypes: Tensor, metric: str) -> Tensor:
    if metric == "dot":
        return -(query @ prototypes.transpose(1, 2))
    if metric == "cosine":
        return 1 - _unit(query) @ _unit(prototypes).transpose(1, 2)
    difference = query.unsqueeze(2) - prototypes.unsqueeze(1)
    if metric == "manhattan":
        return difference.abs().sum(-1)
    squared = difference.square().sum(-1)
    return squared if metric == "sqeuclidean" else _safe_sqrt(squared)


def _safe_sqrt(squared: Tensor) -> Tensor:
    # sqrt has an infinite slope at 0: both branches must stay finite for the gradient to be 0 there. NaN is not 0
    zero = squared == 0
    return torch.where(zero, 0, torch.where(zero, 1, squared).sqrt())


def _unit(x: Tensor) -> Tensor:
    # norm = max(|x|, eps) without the infinite slope of |x| at 0; float16 has no such eps
    wide = x.float() if x.dtype == torch.float16 else x
    return (wide / _safe_sqrt(wide.square().sum(-1, keepdim=True).clamp_min(EPS * EPS))).to(x.dtype)


def fake(query: Tensor, prototypes: Tensor, metric: str) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], prototypes.shape[1])


def backward(args, grads, needs):
    return BACKWARD(grads[0], *args, needs)


# (T, Q, N, D): sizes of 0 and 1, odd sizes, below and above 25 rows (where torch.cdist changes its form)
SIZES = (
    (2, 5, 3, 4),
    (1, 1, 1, 1),
    (3, 7, 30, 17),
    (2, 63, 5, 129),
    (0, 4, 2, 3),
    (2, 0, 3, 4),
    (2, 4, 0, 3),
    (2, 3, 4, 0),
)


def samples(make: Make):
    for metric in METRICS:
        for t, q, n, d in SIZES:
            yield Sample(f"{metric}-T{t}-Q{q}-N{n}-D{d}", (make.normal(t, q, d), make.normal(t, n, d), metric))


def backward_samples(make: Make):
    for metric in METRICS:
        for t, q, n, d in SIZES:
            needs = 3 if (t, q, n, d) != SIZES[2] else 1
            args = (make.normal(t, q, n), make.normal(t, q, d), make.normal(t, n, d), metric, needs)
            yield Sample(f"{metric}-T{t}-Q{q}-N{n}-D{d}-needs{needs}", args)


def workloads(make: Make):
    for t, q, n, d in ((64, 300, 20, 64), (1, 10000, 1000, 64)):
        query, prototypes = make.normal(t, q, d), make.normal(t, n, d)
        size = query.element_size()
        yield Workload(
            f"T{t}-Q{q}-N{n}-D{d}",
            (query, prototypes, "sqeuclidean"),
            flops=2 * t * q * n * d,
            bytes=size * t * (q * d + n * d + q * n),
        )


SPEC = register(
    Op(
        name="pairwise_distance",
        arguments="Tensor query, Tensor prototypes, str metric",
        returns="Tensor",
        summary="distances of the queries to the prototypes",
        reference=reference,
        fake=fake,
        differentiable=("query", "prototypes"),
        backward=backward,
        samples=samples,
        workloads=workloads,
        source="Snell et al. 2017, section 2",
    )
)
_DERIVED = derive_backward(SPEC)
BACKWARD = register(Op(**_DERIVED, backward=lambda *a: vjp_of_reference(BACKWARD)(*a), samples=backward_samples))
