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


def _counts(labels: Tensor, num_classes: int) -> Tensor:
    """`[T, N, 1]`: rows of each class, 1 for an absent one."""
    classes = torch.arange(num_classes, device=labels.device)
    return (labels.unsqueeze(1) == classes.unsqueeze(1)).sum(-1, keepdim=True).clamp_min(1)


def reference(embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    # added, not multiplied by 0 or 1: what is not finite stays with its own class
    tasks, _, width = embeddings.shape
    wide = embeddings.float() if embeddings.dtype in (torch.float16, torch.bfloat16) else embeddings
    index = labels.unsqueeze(-1).expand_as(embeddings)
    sums = wide.new_zeros(tasks, num_classes, width).scatter_add(1, index, wide)
    return (sums / _counts(labels, num_classes)).to(embeddings.dtype)


def fake(embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    return embeddings.new_empty(embeddings.shape[0], num_classes, embeddings.shape[2])


def backward(args, grads, needs):
    _, labels, _ = args
    return (BACKWARD(grads[0], labels),)


def backward_reference(grad: Tensor, labels: Tensor) -> Tensor:
    share = grad / _counts(labels, grad.shape[1])
    return share.gather(1, labels.unsqueeze(-1).expand(-1, -1, grad.shape[2]))


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
