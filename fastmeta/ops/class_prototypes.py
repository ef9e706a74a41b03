"""Class means: `prototype[t, n] = mean of embeddings[t, s] over the s with labels[t, s] = n`.

Linear in the embeddings, and its adjoint gives every row the gradient of its class's prototype divided by the class's
count. The two are each other's gradient, so any order of derivative stays within them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.dispatch.labels import label_range
from fastmeta.dispatch.library import Op, register
from fastmeta.dispatch.spec import Make, Sample, Workload


def weights(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """`[T, N, S]`: 1/count where row s is of class n, 0 elsewhere."""
    classes = torch.arange(num_classes, device=labels.device)
    member = (labels.unsqueeze(1) == classes.unsqueeze(1)).to(dtype)
    return member / member.sum(-1, keepdim=True).clamp_min(1)


def reference(embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    return weights(labels, num_classes, embeddings.dtype) @ embeddings


def fake(embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    return embeddings.new_empty(embeddings.shape[0], num_classes, embeddings.shape[2])


def backward(args, grads, needs):
    _, labels, _ = args
    return (BACKWARD(grads[0], labels),)


def backward_reference(grad: Tensor, labels: Tensor) -> Tensor:
    return weights(labels, grad.shape[1], grad.dtype).transpose(1, 2) @ grad


def backward_fake(grad: Tensor, labels: Tensor) -> Tensor:
    return grad.new_empty(*labels.shape, grad.shape[2])


def backward_backward(args, grads, needs):
    grad, labels = args
    return (SPEC(grads[0], labels, grad.shape[1]),)


def check(embeddings: Tensor, labels: Tensor, num_classes: int) -> None:
    label_range("labels", labels, num_classes)


# (T, S, N, D): sizes of 0 and 1, odd sizes, more classes than rows
SIZES = (
    (2, 5, 3, 4),
    (1, 1, 1, 1),
    (3, 7, 10, 17),
    (2, 63, 5, 129),
    (0, 4, 2, 3),
    (2, 0, 3, 4),
    (2, 4, 3, 0),
    (2, 0, 0, 3),
)


def samples(make: Make):
    for t, s, n, d in SIZES:
        yield Sample(f"T{t}-S{s}-N{n}-D{d}", (make.normal(t, s, d), make.labels(n, t, s), n))


def backward_samples(make: Make):
    for t, s, n, d in SIZES:
        yield Sample(f"T{t}-S{s}-N{n}-D{d}", (make.normal(t, n, d), make.labels(n, t, s)))


def workloads(make: Make):
    t, n, shot, d = 64, 20, 5, 64
    embeddings = make.normal(t, n * shot, d)
    size = embeddings.element_size()
    yield Workload(
        f"T{t}-N{n}-{shot}shot-D{d}",
        (embeddings, make.balanced_labels(t, n, shot), n),
        flops=t * n * shot * d,
        bytes=size * t * d * n * (shot + 1),
    )


SPEC = register(
    Op(
        name="class_prototypes",
        arguments="Tensor embeddings, Tensor labels, int num_classes",
        returns="Tensor",
        summary="class means of the support embeddings",
        reference=reference,
        fake=fake,
        differentiable=("embeddings",),
        backward=backward,
        samples=samples,
        workloads=workloads,
        check=check,
        source="Snell et al. 2017, equation 1",
    )
)
BACKWARD = register(
    Op(
        name="class_prototypes_bwd",
        arguments="Tensor grad, Tensor labels",
        returns="Tensor",
        summary="gradient of `class_prototypes`",
        reference=backward_reference,
        fake=backward_fake,
        differentiable=("grad",),
        backward=backward_backward,
        samples=backward_samples,
    )
)
