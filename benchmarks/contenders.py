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


def prototypical_loss_by_keops(support, support_labels, query, query_labels, num_classes) -> Tensor:
    """Distances that KeOps computes as it sums over them: nothing of size [T, Q, N]."""
    from pykeops.torch import LazyTensor

    one_hot = F.one_hot(support_labels, num_classes).to(support.dtype)
    prototypes = torch.bmm(one_hot.transpose(1, 2), support) / one_hot.sum(1).clamp_min(1).unsqueeze(-1)
    scores = -((LazyTensor(query.unsqueeze(2)) - LazyTensor(prototypes.unsqueeze(1))) ** 2).sum(-1)
    own = prototypes.gather(1, query_labels.unsqueeze(-1).expand(-1, -1, prototypes.shape[2]))
    return (scores.logsumexp(dim=2).squeeze(-1) + (query - own).square().sum(-1)).mean(1)


def nt_xent_by_keops(embeddings: Tensor, temperature: float) -> Tensor:
    """The same for NT-Xent; a row's score with itself is taken out of the sum afterwards."""
    from pykeops.torch import LazyTensor

    scores = (LazyTensor(embeddings.unsqueeze(2)) | LazyTensor(embeddings.unsqueeze(1))) / temperature
    total = scores.logsumexp(dim=2).squeeze(-1)
    itself = embeddings.square().sum(-1) / temperature
    partner = (embeddings * embeddings.roll(embeddings.shape[1] // 2, 1)).sum(-1) / temperature
    return (total + torch.log1p(-(itself - total).exp()) - partner).mean(1)


def update_by_foreach(params: list[Tensor], grads: list[Tensor], lrs: list[Tensor]) -> list[Tensor]:
    return torch._foreach_sub(params, torch._foreach_mul(grads, lrs))


def update_by_addcmul(params: list[Tensor], grads: list[Tensor], lrs: list[Tensor]) -> list[Tensor]:
    return [torch.addcmul(p, g, lr, value=-1) for p, g, lr in zip(params, grads, lrs, strict=True)]


def adam_by_foreach(params, grads, means, squares, lr: float, betas: tuple[float, float], eps: float, step: int):
    """As `torch.optim.Adam(foreach=True)`, out of place, so that autograd can follow it."""
    correction, root = 1 - betas[0] ** step, (1 - betas[1] ** step) ** 0.5
    means = torch._foreach_lerp(means, grads, 1 - betas[0])
    squares = torch._foreach_addcmul(torch._foreach_mul(squares, betas[1]), grads, grads, 1 - betas[1])
    below = torch._foreach_add(torch._foreach_div(torch._foreach_sqrt(squares), root), eps)
    return torch._foreach_addcdiv(params, means, below, -lr / correction), means, squares


def adam_by_torchopt(params, grads, means, squares, lr: float, betas: tuple[float, float], eps: float, step: int):
    """TorchOpt's fused operator, one tensor after the other."""
    from torchopt.accelerated_op import AdamOp

    op = AdamOp(b1=betas[0], b2=betas[1], eps=eps, eps_root=0.0, inplace=False)
    found = [op(m, v, g, step) for m, v, g in zip(means, squares, grads, strict=True)]
    moved = [p - lr * update for p, (_, _, update) in zip(params, found, strict=True)]
    return moved, [m for m, _, _ in found], [v for _, v, _ in found]


def mlp_by_baddbmm(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))
        if layer < len(weights) - 1:
            x = torch.relu(x)
    return x


def task_query_loss(model, params, loss, support_x, support_y, query_x, query_y, lr, steps):
    """Query loss of one task after its inner steps, by `torch.func.grad`; `lr`: a number, or rates by name."""
    rates = lr if isinstance(lr, dict) else dict.fromkeys(params, lr)

    def support_loss(p):
        return loss(functional_call(model, p, (support_x,)), support_y)

    for _ in range(steps):
        grads = grad(support_loss)(params)
        params = {name: p - rates[name] * grads[name] for name, p in params.items()}
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


def _clone(module: torch.nn.Module) -> torch.nn.Module:
    """A module whose parameters are clones in the graph, as learn2learn's `clone_module` makes it."""
    clone = module.__new__(type(module))
    clone.__dict__ = module.__dict__.copy()
    clone._parameters = {name: None if p is None else p.clone() for name, p in module._parameters.items()}
    clone._modules = {name: None if m is None else _clone(m) for name, m in module._modules.items()}
    return clone


def maml_like_learn2learn(model, loss, batch, lr, steps) -> tuple[Tensor, ...]:
    """A loop over the tasks as learn2learn has it: a cloned module for each, whose parameters every step replaces."""
    total = 0.0
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        fast_model = _clone(model)
        for _ in range(steps):
            owners = [(m, name) for m in fast_model.modules() for name, p in m._parameters.items() if p is not None]
            fast = [m._parameters[name] for m, name in owners]
            grads = torch.autograd.grad(loss(fast_model(support_x), support_y), fast, create_graph=True)
            for (m, name), p, g in zip(owners, fast, grads, strict=True):
                m._parameters[name] = p - lr * g
        total = total + loss(fast_model(query_x), query_y)
    return torch.autograd.grad(total / batch.support_x.shape[0], list(model.parameters()))


def maml_by_learn2learn(model, loss, batch, lr, steps) -> tuple[Tensor, ...]:
    """learn2learn itself (Arnold et al. 2020)."""
    import learn2learn

    maml, total = learn2learn.algorithms.MAML(model, lr=lr), 0.0
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        learner = maml.clone()
        for _ in range(steps):
            learner.adapt(loss(learner(support_x), support_y))
        total = total + loss(learner(query_x), query_y)
    return torch.autograd.grad(total / batch.support_x.shape[0], list(model.parameters()))


def maml_by_torchopt(model, loss, batch, lr, steps) -> tuple[Tensor, ...]:
    """A loop over the tasks with the differentiable optimisers of TorchOpt (Ren et al. 2023)."""
    import torchopt

    slow = list(model.parameters())
    optimizer, total = torchopt.MetaSGD(model, lr=lr), 0.0
    start = torchopt.extract_state_dict(model, by="reference"), torchopt.extract_state_dict(optimizer, by="reference")
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        for _ in range(steps):
            optimizer.step(loss(model(support_x), support_y))
        total = total + loss(model(query_x), query_y)
        torchopt.recover_state_dict(model, start[0])
        torchopt.recover_state_dict(optimizer, start[1])
    return torch.autograd.grad(total / batch.support_x.shape[0], slow)


def maml_by_jax(model, regression, batch, lr, steps) -> Callable[[], object]:
    """`jit(grad(mean(vmap(...))))` in JAX."""
    if batch.support_x.dtype != torch.float32:
        raise ValueError("JAX computes in float32 here")
    from . import peers_jax

    return peers_jax.maml(model, regression, batch, lr, steps)


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


# a Python loop over the tasks, which takes a minute for a thousand of them
LOOPS = {
    "task loop": maml_by_loop,
    "learn2learn-like loop": maml_like_learn2learn,
    "learn2learn": maml_by_learn2learn,
    "higher": maml_by_higher,
    "TorchOpt": maml_by_torchopt,
}


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
