"""NT-Xent, the loss of contrastive learning, from the embeddings of two views of `B` examples, `V = 2 B` rows in all:

    s[i, j] = <z_i, z_j> / temperature,   partner(i) = i + B modulo V
    loss = mean over i of  logsumexp_{j != i} s[i, j] - s[i, partner(i)]

Scores live only while a block of them is worked on: nothing of size `[T, V, V]` is kept, the backward forms them again.
No rows give NaN, as the mean of nothing does; one example gives 0, there is nothing to tell it from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.dispatch.derivation import derive_backward, vjp_of_reference
from fastmeta.dispatch.library import Op, register
from fastmeta.dispatch.spec import Make, Sample, Workload


def reference(embeddings: Tensor, temperature: float) -> Tensor:
    rows = embeddings.shape[1]
    if rows == 0:
        return embeddings.sum(-1).mean(-1)
    scores = embeddings @ embeddings.mT / temperature
    itself = torch.eye(rows, dtype=torch.bool, device=embeddings.device)
    half = rows // 2
    log_probs = scores.masked_fill(itself, -torch.inf).log_softmax(-1)
    return -torch.cat([log_probs.diagonal(half, -2, -1), log_probs.diagonal(-half, -2, -1)], -1).mean(-1)


def fake(embeddings, temperature):
    return embeddings.new_empty(embeddings.shape[0])


def backward(args, grads, needs):
    return (BACKWARD(grads[0], *args, needs),)


# (T, B, D): sizes of 0 and 1, odd sizes, more rows than a block
SIZES = ((2, 3, 4), (1, 1, 1), (3, 17, 5), (1, 70, 9), (0, 4, 3), (2, 0, 3), (2, 4, 0))


def _embeddings(make: Make, tasks: int, examples: int, width: int) -> Tensor:
    rows = make.normal(tasks, 2 * examples, width)
    return torch.nn.functional.normalize(rows, dim=-1) if width else rows


def samples(make: Make):
    for tasks, examples, width in SIZES:
        temperature = 0.05 if width == 9 else 0.5
        label = f"temperature{temperature}-T{tasks}-B{examples}-D{width}"
        yield Sample(label, (_embeddings(make, tasks, examples, width), temperature))


def backward_samples(make: Make):
    for sample in samples(make):
        yield Sample(sample.label, (make.normal(len(sample.args[0])), *sample.args, 1))


def workloads(make: Make):
    for tasks, examples, width in ((1, 512, 64), (1, 4096, 128)):
        rows = 2 * examples
        yield Workload(
            f"T{tasks}-B{examples}-D{width}",
            (_embeddings(make, tasks, examples, width), 0.5),
            flops=tasks * rows * (rows - 1) * width,  # the scores are symmetric
            bytes=make.normal(1).element_size() * tasks * rows * width,
        )


SPEC = register(
    Op(
        name="contrastive_loss",
        arguments="Tensor embeddings, float temperature",
        returns="Tensor",
        summary="NT-Xent of two views without the matrix of scores",
        reference=reference,
        fake=fake,
        differentiable=("embeddings",),
        backward=backward,
        samples=samples,
        workloads=workloads,
        with_gradient=True,
        per_task=True,
        backends=("cpp", "triton", "reference"),
        source="Chen et al. 2020, equation 1",
    )
)
_DERIVED = derive_backward(SPEC)
BACKWARD = register(
    Op(
        **_DERIVED,
        backward=lambda *a: vjp_of_reference(BACKWARD)(*a),
        samples=backward_samples,
        backends=SPEC.backends,
    )
)
