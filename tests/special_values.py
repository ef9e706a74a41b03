"""NaN, infinities and zeros in one row of one task, through every op in plain PyTorch: what is to become of them.

An op is named with its arguments at op level, differentiable tensors apart, and a formula that calls no code of this
package. Shared by the backends' tests and those of the CUDA kernels on the CPU.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

METRICS = ("sqeuclidean", "euclidean", "cosine", "dot", "manhattan")
ACTIVATIONS = {
    "identity": lambda x: x, "relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "silu": F.silu,
    "gelu": F.gelu, "sine": torch.sin,
}  # fmt: skip
LOSSES = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "binary_cross_entropy": F.binary_cross_entropy_with_logits,
    "huber": lambda p, y: F.huber_loss(p, y, delta=0.7),
}
VALUES = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf, "zeros": None}
TASK, ROW, COLUMN = 1, 1, 2  # where they are
WIDTHS = (4, 9, 6, 3)  # of nets: neither whole vectors nor alike


class Case(NamedTuple):
    name: str
    tensors: list[Tensor]  # differentiable, float64
    arguments: Callable  # tensors -> what the op takes
    plain: Callable  # tensors -> its outputs
    differentiable_outputs: int


def spoiled(x: Tensor, value: str) -> Tensor:
    """`x` `[T, B, D]` with the value in one row."""
    x = x.clone()
    if VALUES[value] is None:
        x[TASK, ROW] = 0
    else:
        x[TASK, ROW, COLUMN] = VALUES[value]
    return x


def distance(q: Tensor, p: Tensor, metric: str) -> Tensor:
    a, b = q[:, :, None], p[:, None]
    if metric == "cosine":
        return 1 - F.cosine_similarity(a, b, dim=-1, eps=1e-8)
    if metric == "dot":
        return -(a * b).sum(-1)
    if metric == "euclidean":
        return torch.linalg.vector_norm(a - b, dim=-1)
    return (a - b).square().sum(-1) if metric == "sqeuclidean" else (a - b).abs().sum(-1)


def means(x: Tensor, labels: Tensor, classes: int) -> Tensor:
    """An absent class is a row of zeros."""
    return torch.stack(
        [
            torch.stack([rows[own == n].mean(0) if (own == n).any() else rows.new_zeros(rows.shape[1:])
                         for n in range(classes)])
            for rows, own in zip(x, labels, strict=True)
        ]
    )  # fmt: skip


def loss_and_accuracy(support, labels, query, query_labels, classes, metric):
    d = distance(query, means(support, labels, classes), metric)
    loss = F.cross_entropy(-d.transpose(1, 2), query_labels, reduction="none").mean(1)
    nearest = d.detach().nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf).argmin(-1)
    hits = (nearest == query_labels) & ~d.isnan().any(-1)  # nothing is nearest where a distance is NaN
    return loss, hits.double().mean(1)


def contrast(z, temperature):
    rows = z.shape[1]
    scores = (z @ z.mT / temperature).masked_fill(torch.eye(rows, dtype=torch.bool), -torch.inf)
    partner = (torch.arange(rows) + rows // 2) % rows
    return F.cross_entropy(scores.transpose(1, 2), partner.expand(len(z), rows), reduction="none").mean(1)


def net(x, weights, biases, activation):
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        x = torch.baddbmm(b[:, None], x, w.mT) if w.dim() == 3 else F.linear(x, w, b)
        x = x if i + 1 == len(weights) else ACTIVATIONS[activation](x)
    return x


def adapted(x, y, weights, biases, loss, activation, lr, steps):
    """Fast parameters of one task."""
    slow = [w[0] for w in weights] + [b[0] for b in biases]
    layers = len(weights)
    for _ in range(steps):
        value = LOSSES[loss](net(x, slow[:layers], slow[layers:], activation), y)
        slow = [p - lr * g for p, g in zip(slow, torch.autograd.grad(value, slow, create_graph=True), strict=True)]
    return slow[:layers], slow[layers:]


def convolution(x, weight, bias):
    """Images `[T, B, H, W, C]`, one task at a time."""
    return torch.stack([
        F.conv2d(images.permute(0, 3, 1, 2), w, b, padding=1).permute(0, 2, 3, 1)
        for images, w, b in zip(x, weight, bias, strict=True)
    ])  # fmt: skip


def _draw(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def cases(value: str) -> list[Case]:
    """Of every op but the inner loops."""
    found = []
    for metric in METRICS:
        draw = _draw()
        query, prototypes = draw(3, 5, 4), draw(3, 6, 4)
        arguments = lambda q, p, m=metric: (q, p, m)  # noqa: E731
        plain = lambda q, p, m=metric: (distance(q, p, m),)  # noqa: E731
        found.append(Case(f"pairwise_distance-{metric}", [spoiled(query, value), prototypes], arguments, plain, 1))
        found.append(
            Case(f"pairwise_distance-{metric}-prototypes", [query, spoiled(prototypes, value)], arguments, plain, 1)
        )
        support, labels = draw(3, 7, 4), torch.tensor([[0, 1, 2, 3, 4, 0, 4]]).expand(3, 7).contiguous()  # 5 absent
        own = torch.tensor([[3, 1, 2, 0, 1]]).expand(3, 5).contiguous()
        arguments = lambda s, q, y=labels, z=own, m=metric: (s, y, q, z, 6, m)  # noqa: E731
        plain = lambda s, q, y=labels, z=own, m=metric: loss_and_accuracy(s, y, q, z, 6, m)  # noqa: E731
        found.append(Case(f"prototypical_loss-{metric}-query", [support, spoiled(query, value)], arguments, plain, 1))
        found.append(Case(f"prototypical_loss-{metric}-support", [spoiled(support, value), query], arguments, plain, 1))
    found.append(
        Case("class_prototypes", [spoiled(support, value)], lambda s, y=labels: (s, y, 6),
             lambda s, y=labels: (means(s, y, 6),), 1)
    )  # fmt: skip
    found.append(
        Case("contrastive_loss", [spoiled(draw(3, 6, 4), value)], lambda z: (z, 0.5), lambda z: (contrast(z, 0.5),), 1)
    )
    for activation in ACTIVATIONS:
        draw = _draw(1)
        x, shapes = draw(3, 5, WIDTHS[0]), list(zip(WIDTHS[1:], WIDTHS[:-1], strict=True))
        weights, biases = [draw(3, *shape) / 2 for shape in shapes], [draw(3, shape[0]) for shape in shapes]
        n = len(shapes)
        arguments = lambda x, *p, n=n, a=activation: (x, list(p[:n]), list(p[n:]), a)  # noqa: E731
        plain = lambda x, *p, n=n, a=activation: (net(x, p[:n], p[n:], a),)  # noqa: E731
        found.append(Case(f"functional_mlp-{activation}", [spoiled(x, value), *weights, *biases], arguments, plain, 1))
    params, grads, rates = (_draw(seed)(3, 5) for seed in (2, 3, 4))
    grads[TASK, COLUMN] = 0.0 if VALUES[value] is None else VALUES[value]
    found.append(
        Case("fast_weight_update", [params, grads, rates], lambda p, g, r: ([p], [g], [r], 0.0),
             lambda p, g, r: (p - r * g,), 1)
    )  # fmt: skip
    squares = _draw(5)(3, 5).square() + 0.1
    numbers = (0.1, 0.3, 0.2, 0.1, 0.0)

    def adam(p, g, m):
        mean, square = 0.7 * m + 0.3 * g, 0.8 * squares + 0.2 * g * g
        return p - 0.1 * mean / (square.sqrt() + 0.1), mean, square

    found.append(
        Case("adam_step", [params, grads, rates],
             lambda p, g, m: ([p], [g], [m], [squares.to(p)], [], [], [], [], [], [], *numbers, False, False), adam, 3)
    )  # fmt: skip
    for channels in (3, 16):  # few, and enough for tiles
        draw = _draw(6)
        x, w, b = draw(3, 5, 7 * 6 * channels), draw(3, 17, channels, 3, 3) / 9, draw(3, 17)
        images = lambda x, c=channels: x.view(3, 5, 7, 6, c)  # noqa: E731
        found.append(
            Case(f"task_conv2d-{channels}", [spoiled(x, value), w, b],
                 lambda x, w, b, images=images: (images(x), w, [b], 1, 1, 1, 1, 1, 1, 1),
                 lambda x, w, b, images=images: (convolution(images(x), w, b),), 1)
        )  # fmt: skip
    return found


def agree(ours: Tensor, truth: Tensor, tolerance: float, what: str) -> None:
    """NaN and either infinity in the same entries, the others alike."""
    assert ours.shape == truth.shape, f"{what}: shape {list(ours.shape)}, should be {list(truth.shape)}"
    ours, truth = ours.detach().to("cpu", torch.float64), truth.detach()
    for name, of in (("NaN", torch.isnan), ("infinity", torch.isposinf), ("-infinity", torch.isneginf)):
        wrong = of(ours) != of(truth)
        where, right = (of(t).nonzero().tolist() for t in (ours, truth))
        assert not wrong.any(), f"{what}: {name} in {where}, should be in {right}"
    finite = truth.isfinite()
    scale = max(1.0, float(truth[finite].abs().max())) if finite.any() else 1.0
    error = float((ours - truth)[finite].abs().max()) if finite.any() else 0.0
    assert error <= tolerance * scale, f"{what}: off by {error:.2e}"


def flat(outputs) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return [t for part in outputs for t in flat(part)]


def with_gradients(function: Callable, tensors: list[Tensor], differentiable_outputs: int):
    """Outputs of `function(*tensors)`, and the gradients of all tensors for outputs weighted by fixed numbers."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    outputs = flat(function(*leaves))
    of = outputs[:differentiable_outputs]
    cotangents = [torch.linspace(0.5, 1.5, o.numel(), dtype=torch.float64).view(o.shape).to(o) for o in of]
    return outputs, torch.autograd.grad(of, leaves, cotangents)
