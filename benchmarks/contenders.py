"""The same work as our ops and algorithms, as people write it today: plain PyTorch, `torch.func`, a loop over tasks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap


def in_cuda_graph(run: Callable[[], object]) -> Callable[[], object]:
    """`run` recorded once and replayed: what it costs without Python and launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay():
        graph.replay()
        return results

    return replay


def unfused_prototypical_loss(support, support_labels, query, query_labels, num_classes) -> Tensor:
    """One-hot bmm for the prototypes, squared distances by bmm, cross-entropy."""
    one_hot = F.one_hot(support_labels, num_classes).to(support.dtype)
    counts = one_hot.sum(1).clamp_min(1)
    prototypes = torch.bmm(one_hot.transpose(1, 2), support) / counts.unsqueeze(-1)
    logits = -squared_distance_by_bmm(query, prototypes)
    losses = F.cross_entropy(logits.flatten(0, 1), query_labels.flatten(), reduction="none")
    return losses.view(query_labels.shape).mean(1)


def materialised_prototypical_loss(support, support_labels, query, query_labels, num_classes) -> Tensor:
    """As most repositories have it: differences of size [T, Q, N, D]."""
    one_hot = F.one_hot(support_labels, num_classes).to(support.dtype)
    prototypes = torch.bmm(one_hot.transpose(1, 2), support) / one_hot.sum(1).clamp_min(1).unsqueeze(-1)
    logits = -(query.unsqueeze(2) - prototypes.unsqueeze(1)).square().sum(-1)
    losses = F.cross_entropy(logits.flatten(0, 1), query_labels.flatten(), reduction="none")
    return losses.view(query_labels.shape).mean(1)


def squared_distance_by_bmm(query: Tensor, prototypes: Tensor) -> Tensor:
    squares = query.square().sum(-1, keepdim=True) + prototypes.square().sum(-1).unsqueeze(1)
    return torch.baddbmm(squares, query, prototypes.transpose(1, 2), alpha=-2)


def squared_distance_by_cdist(query: Tensor, prototypes: Tensor) -> Tensor:
    return torch.cdist(query, prototypes).square()


def nt_xent(embeddings: Tensor, temperature: float) -> Tensor:
    """NT-Xent of unit rows by cross entropy over the whole matrix of scores, its diagonal masked."""
    rows = embeddings.shape[1]
    scores = torch.bmm(embeddings, embeddings.mT) / temperature
    scores = scores.masked_fill(torch.eye(rows, dtype=torch.bool, device=scores.device), float("-inf"))
    partner = torch.arange(rows, device=scores.device).roll(rows // 2).repeat(len(scores))
    losses = F.cross_entropy(scores.flatten(0, 1), partner, reduction="none")
    return losses.view(embeddings.shape[:2]).mean(1)


def update_by_foreach(params: list[Tensor], grads: list[Tensor], lrs: list[Tensor]) -> list[Tensor]:
    return torch._foreach_sub(params, torch._foreach_mul(grads, lrs))


def update_by_addcmul(params: list[Tensor], grads: list[Tensor], lrs: list[Tensor]) -> list[Tensor]:
    return [torch.addcmul(p, g, lr, value=-1) for p, g, lr in zip(params, grads, lrs, strict=True)]


def mlp_by_baddbmm(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))
        if layer < len(weights) - 1:
            x = torch.relu(x)
    return x


def task_query_loss(model, params, loss, support_x, support_y, query_x, query_y, lr, steps):
    """Query loss of one task after its inner steps, by `torch.func.grad`."""

    def support_loss(p):
        return loss(functional_call(model, p, (support_x,)), support_y)

    for _ in range(steps):
        params = {
            name: p - lr * g for (name, p), g in zip(params.items(), grad(support_loss)(params).values(), strict=True)
        }
    return loss(functional_call(model, params, (query_x,)), query_y)


def maml_by_vmap(model, loss, batch, lr, steps) -> tuple[Tensor, ...]:
    """Meta-gradient by `vmap` of `grad` over the tasks."""
    params = dict(model.named_parameters())

    def one(params, *task):
        return task_query_loss(model, params, loss, *task, lr, steps)

    losses = vmap(one, in_dims=(None, 0, 0, 0, 0))(params, *batch)
    return torch.autograd.grad(losses.mean(), list(params.values()))


def maml_compiled(model, loss, batch, lr, steps):
    """The same under `torch.compile`, gradient and all."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def meta_loss(params):
        def one(params, *task):
            return task_query_loss(model, params, loss, *task, lr, steps)

        return vmap(one, in_dims=(None, 0, 0, 0, 0))(params, *batch).mean()

    torch._dynamo.reset()
    compiled = torch.compile(grad(meta_loss), dynamic=False)
    return lambda: list(compiled(params).values())


def maml_by_higher(model, loss, batch, lr, steps) -> tuple[Tensor, ...]:
    """A loop over the tasks with the functional copies of `higher` (Grefenstette et al. 2019)."""
    import higher

    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    total = 0.0
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fast_model, inner):
            for _ in range(steps):
                inner.step(loss(fast_model(support_x), support_y))
            total = total + loss(fast_model(query_x), query_y)
    return torch.autograd.grad(total / batch.support_x.shape[0], list(model.parameters()))


def maml_by_loop(model, loss, batch, lr, steps) -> tuple[Tensor, ...]:
    """Meta-gradient by a Python loop over the tasks with `create_graph`, as MAML repositories have it."""
    names, slow = zip(*model.named_parameters(), strict=True)
    total = 0.0
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        fast = list(slow)
        for _ in range(steps):
            value = loss(functional_call(model, dict(zip(names, fast, strict=True)), (support_x,)), support_y)
            grads = torch.autograd.grad(value, fast, create_graph=True)
            fast = [p - lr * g for p, g in zip(fast, grads, strict=True)]
        total = total + loss(functional_call(model, dict(zip(names, fast, strict=True)), (query_x,)), query_y)
    return torch.autograd.grad(total / batch.support_x.shape[0], slow)


def supervised(model, loss, batch) -> tuple[Tensor, ...]:
    """Plain supervised forward and backward over the same rows, without any adaptation: the yardstick."""
    x = torch.cat([batch.support_x, batch.query_x], 1).flatten(0, 1)
    y = torch.cat([batch.support_y, batch.query_y], 1).flatten(0, 1)
    return torch.autograd.grad(loss(model(x), y), list(model.parameters()))


def protonet_by_loop(encoder, batch, num_classes) -> tuple[Tensor, ...]:
    """Gradient of the mean loss of a Prototypical Network, one task after the other."""
    total = 0.0
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        embedded = encoder(torch.cat([support_x, query_x]))
        support, query = embedded[: len(support_x)], embedded[len(support_x) :]
        prototypes = torch.stack([support[support_y == n].mean(0) for n in range(num_classes)])
        total = total + F.cross_entropy(-(query.unsqueeze(1) - prototypes).square().sum(-1), query_y)
    return torch.autograd.grad(total / batch.support_x.shape[0], list(encoder.parameters()))
