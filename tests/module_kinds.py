"""Modules of every kind that people hand over, each with tasks for it, and the plain loop that says what is right."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

TASKS, SUPPORT, QUERY, WAYS = 3, 6, 4, 3


class Recurrent(nn.Module):
    def __init__(self, kind: str, **options):
        super().__init__()
        self.rnn = getattr(nn, kind)(4, 5, batch_first=True, **options)
        width = (options.get("proj_size") or 5) * (2 if options.get("bidirectional") else 1)
        self.out = nn.Linear(width, WAYS)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.inner, self.out = nn.Linear(6, 6), nn.Linear(6, WAYS)

    def forward(self, x):
        h = self.first(x)
        return self.out(h + torch.tanh(self.inner(self.norm(h))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.out = nn.Linear(4, WAYS)

    def forward(self, x):
        return self.out(self.layer(x).mean(1))


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(11, 6, padding_idx=0), nn.Linear(6, WAYS)

    def forward(self, ids):
        return self.out(torch.tanh(self.embed(ids)).mean(1))


class Heads(nn.Module):
    """One head for each data set, chosen by an attribute."""

    def __init__(self):
        super().__init__()
        self.body, self.heads = nn.Linear(4, 6), nn.ModuleList([nn.Linear(6, WAYS), nn.Linear(6, WAYS)])
        self.use = 0

    def forward(self, x):
        return self.heads[self.use](torch.relu(self.body(x)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, WAYS)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Checkpointed(nn.Module):
    """What is right is its gradient without checkpoints (`run` below): a plain loop with `functional_call` is silently
    wrong, since the block runs again when the module has its own weights back."""

    def __init__(self):
        super().__init__()
        self.saving = True
        self.block = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6))
        self.out = nn.Linear(6, WAYS)

    def forward(self, x):
        h = checkpoint(self.block, x, use_reentrant=False) if self.saving else self.block(x)
        return self.out(torch.tanh(h))


class _Reverse(torch.autograd.Function):
    """Gradient reversal, written as most code has it."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


class OwnFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, WAYS)

    def forward(self, x):
        return self.b(_Reverse.apply(torch.tanh(self.a(x))))


class Masked(nn.Module):
    """What is computed depends on the data."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, WAYS)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        if float(h.detach().mean()) > 0:
            h = h * 2
        return self.b(h)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, WAYS))


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, WAYS))
    net[2].requires_grad_(False)
    return net


def hooked() -> nn.Module:
    net = mlp()
    net.kept = []
    net[1].register_forward_hook(lambda module, given, output: net.kept.append(output.detach()))
    return net


def conv() -> nn.Module:
    block = (nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*block, nn.Flatten(), nn.Linear(12, WAYS))


def group_norm() -> nn.Module:
    block = (nn.Conv1d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU())
    return nn.Sequential(nn.Unflatten(1, (1, 4)), *block, nn.Flatten(), nn.Linear(16, WAYS))


# name -> how it is made, and the shape of an example (None: token ids)
KINDS = {
    "mlp": (mlp, (4,)),
    "conv, batch norm": (conv, (1, 4, 4)),
    "conv, group norm": (group_norm, (4,)),
    "residual, layer norm": (Residual, (4,)),
    "LSTM": (lambda: Recurrent("LSTM"), (5, 4)),
    "LSTM, two layers, both directions": (lambda: Recurrent("LSTM", num_layers=2, bidirectional=True), (3, 4)),
    "LSTM, projections": (lambda: Recurrent("LSTM", proj_size=2), (3, 4)),
    "GRU": (lambda: Recurrent("GRU", bias=False), (5, 4)),
    "RNN": (lambda: Recurrent("RNN"), (5, 4)),
    "transformer encoder": (Transformer, (5, 4)),
    "text, embeddings": (Text, None),
    "several heads": (Heads, (4,)),
    "tied weights": (Tied, (4,)),
    "partly frozen": (frozen, (4,)),
    "weight norm": (lambda: nn.Sequential(weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, WAYS)), (4,)),
    "spectral norm": (lambda: nn.Sequential(spectral_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, WAYS)), (4,)),
    "checkpointed": (Checkpointed, (4,)),
    "own autograd.Function": (OwnFunction, (4,)),
    "hooks": (hooked, (4,)),
    "depends on the data": (Masked, (4,)),
}


def make(kind: str, seed: int = 0) -> nn.Module:
    """In float64, in train mode."""
    torch.manual_seed(seed)
    return KINDS[kind][0]().double()


def tasks(kind: str, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, g = KINDS[kind][1], torch.Generator().manual_seed(seed)

    def rows(count):
        if shape is None:
            return torch.randint(11, (TASKS, count, 5), generator=g)
        return torch.randn(TASKS, count, *shape, generator=g, dtype=torch.float64)

    def labels(count):
        return torch.randint(WAYS, (TASKS, count), generator=g)

    return rows(SUPPORT), labels(SUPPORT), rows(QUERY), labels(QUERY)


def run(net: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """One task's predictions; what `forward` writes into buffers is dropped, and nothing is checkpointed."""
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    args, kwargs = ((), x) if isinstance(x, dict) else (tuple(x) if type(x) in (tuple, list) else (x,), {})
    if not isinstance(net, Checkpointed):
        return functional_call(net, (weights, buffers), args, kwargs)
    net.saving = False
    predictions = functional_call(net, (weights, buffers), args, kwargs)
    net.saving = True
    return predictions


def adapted(net, x, y, *, lr, steps, first_order=False, loss=F.cross_entropy, adapts=lambda name: True):
    """One task's weights after plain inner steps."""
    weights = dict(net.named_parameters())
    moving = [name for name, p in weights.items() if p.requires_grad and adapts(name)]
    for _ in range(steps):
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            value = loss(run(net, weights, x), y)
        at = [weights[name] for name in moving]
        found = torch.autograd.grad(value, at, create_graph=not first_order, allow_unused=True)
        for name, gradient in zip(moving, found, strict=True):
            if gradient is not None:
                weights[name] = weights[name] - lr * gradient
    return weights


def plain(net, batch, *, loss=F.cross_entropy, seen=lambda prediction: prediction, **options):
    """Task losses `[T]`, what is `seen` of the predictions `[T, Q, C]`, and the meta-gradient by name, one task at a
    time."""
    losses, predictions = [], []
    for sx, sy, qx, qy in zip(*batch, strict=True):
        prediction = run(net, adapted(net, sx, sy, loss=loss, **options), qx)
        predictions.append(seen(prediction))
        losses.append(loss(prediction, qy))
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(torch.stack(losses).mean(), list(named.values()), allow_unused=True)
    gradients = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}
    return torch.stack(losses).detach(), torch.stack(predictions).detach(), gradients


def with_context(net, batch, *, lr, steps, size=2):
    """Task losses and the meta-gradient where a vector beside each row is all that adapts."""
    weights, losses = dict(net.named_parameters()), []

    def loss(context, x, y):
        return F.cross_entropy(run(net, weights, torch.cat([x, context.expand(len(x), -1)], -1)), y)

    for sx, sy, qx, qy in zip(*batch, strict=True):
        context = torch.zeros(size, dtype=torch.float64, requires_grad=True)
        for _ in range(steps):
            context = context - lr * torch.autograd.grad(loss(context, sx, sy), context, create_graph=True)[0]
        losses.append(loss(context, qx, qy))
    named = {name: p for name, p in weights.items() if p.requires_grad}
    found = torch.autograd.grad(torch.stack(losses).mean(), list(named.values()), allow_unused=True)
    gradients = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}
    return torch.stack(losses).detach(), gradients


def implicit(net, batch, *, lr, steps, regularization, cg_steps):
    """Task losses and the gradient of implicit MAML, after so many steps of conjugate gradients."""
    named = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}
    names, start = list(named), list(named.values())
    losses, solutions = [], []

    def gradient(weights, x, y, **options):
        fast = dict(net.named_parameters()) | dict(zip(names, weights, strict=True))
        with sdpa_kernel(SDPBackend.MATH):
            value = F.cross_entropy(run(net, fast, x), y)
        return value, torch.autograd.grad(value, weights, materialize_grads=True, **options)

    for sx, sy, qx, qy in zip(*batch, strict=True):
        weights = [w.clone().requires_grad_() for w in start]
        for _ in range(steps):
            found = gradient(weights, sx, sy)[1]
            moved = [w - lr * (g + regularization * (w - w0)) for w, g, w0 in zip(weights, found, start, strict=True)]
            weights = [w.detach().requires_grad_() for w in moved]
        value, right = gradient(weights, qx, qy)
        losses.append(value.detach())
        support = torch.cat([g.flatten() for g in gradient(weights, sx, sy, create_graph=True)[1]])

        def product(vector, support=support, weights=weights):
            along = torch.autograd.grad(support, weights, vector, retain_graph=True, materialize_grads=True)
            return vector + torch.cat([part.flatten() for part in along]) / regularization

        solution = torch.zeros_like(support.detach())
        residual = direction = torch.cat([g.flatten() for g in right])
        for _ in range(cg_steps):
            along = product(direction)
            length = residual.dot(residual) / direction.dot(along)
            solution, before = solution + length * direction, residual.dot(residual)
            residual = residual - length * along
            direction = residual + residual.dot(residual) / before * direction
        solutions.append(solution)
    parts = torch.stack(solutions).mean(0).split([w.numel() for w in start])
    gradients = {name: part.view_as(named[name]) for name, part in zip(names, parts, strict=True)}
    return torch.stack(losses), gradients
