"""Modules with low-rank fast weights, and a plain Python loop over their tasks in float64."""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from fastmeta.engines import InnerLoop, as_loss
from fastmeta.engines.lowrank_module import LowRankModuleEngine

ENGINE = LowRankModuleEngine()
LOSSES = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.n1, self.n2 = nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, x):
        x = F.gelu(self.n1(self.a(x.flatten(1))))
        x = x + F.gelu(self.n2(self.b(x)))
        return self.d(F.gelu(self.c(x)))


class Twice(nn.Module):
    """One layer in two places, and another layer's weight without its bias."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.tanh(self.a(torch.tanh(self.a(x))))
        return self.c(torch.tanh(F.linear(self.b(x), self.b.weight)))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.mix, self.out = nn.Linear(6, 5), nn.Linear(4, 4, bias=False), nn.Linear(5, 3)

    def forward(self, x):  # [B, 4, 6]
        x = torch.tanh(self.token(x))
        x = x + self.mix(x.mT).mT
        return self.out(x.mean(1))


class Direct(nn.Module):
    """Weights used otherwise than as a linear layer: these have a copy per task."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.scale, self.never = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2))

    def forward(self, x):
        x = torch.tanh(self.a(x)) @ self.a.weight.mT
        x = torch.tanh(self.b(x)) * self.scale + self.b.bias
        assert self.c.weight.shape == (5, 5) and self.c.weight.dtype == x.dtype
        with torch.no_grad():
            x = x + self.c(x)
        return self.d(torch.tanh(self.c(x)))


class SharedBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.bias = self.a.bias

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Straight(torch.autograd.Function):
    """A linear layer with a gradient of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight):
        return F.linear(x, weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return 2 * gradient @ weight, 3 * gradient.mT @ x


class OwnGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5, bias=False), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(torch.tanh(Straight.apply(x, self.a.weight)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):  # [B, 4, 6]
        q, k, v = (f(x).unflatten(-1, (2, 3)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


class Multihead(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.attention, self.out = (
            nn.Linear(6, 6),
            nn.MultiheadAttention(6, 2, batch_first=True),
            nn.Linear(6, 3),
        )

    def forward(self, x):
        x = self.fc(x)
        return self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.fc, self.out = nn.Embedding(6, 4), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = self.embedding((x * 3).long().abs() % 6).mean(1)
        return self.out(torch.relu(self.fc(x)))


class Nested(nn.Module):
    """A transform inside `forward`: what a probe would see of it is not what it is."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 1), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.func.vmap(lambda row: torch.tanh(self.a(row)))(x)
        return self.c(torch.tanh(torch.func.grad(lambda x: self.b(x).sin().sum())(x)))


def hooked():
    model = Residual()
    model.b.register_forward_hook(lambda module, args, output: output * 2 + module.bias.sin())
    return model


def batch_norm(**options):
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, **options), nn.Tanh(), nn.Linear(8, 3))


def frozen(*names):
    def make():
        model = Residual()
        for name in names:
            model.get_parameter(name).requires_grad_(False)
        return model

    return make


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)), (6,)),
    "residual": (Residual, (6,)),
    "residual_image": (Residual, (1, 2, 3)),
    "batch_norm": (lambda: batch_norm(track_running_stats=False), (6,)),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3, track_running_stats=False), nn.Tanh(), nn.Flatten(),
                              nn.Linear(27, 5), nn.Tanh(), nn.Linear(5, 3)),
        (1, 4, 4),
    ),
    "instance_norm": (
        lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2), nn.InstanceNorm1d(4, affine=True),
                              nn.Flatten(), nn.Linear(8, 3)),
        (6,),
    ),
    "group_norm": (lambda: nn.Sequential(nn.Linear(6, 4), nn.GroupNorm(2, 4), nn.Linear(4, 3)), (6,)),
    "rms_norm": (lambda: nn.Sequential(nn.Linear(6, 4), nn.RMSNorm(4), nn.Linear(4, 3)), (6,)),
    "weight_norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3)),
        (6,),
    ),
    "twice": (Twice, (6,)),
    "tied": (Tied, (6,)),
    "shared_bias": (SharedBias, (6,)),
    "direct": (Direct, (6,)),
    "own_gradient": (OwnGradient, (6,)),
    "no_bias": (lambda: nn.Sequential(nn.Linear(6, 5, bias=False), nn.LayerNorm(5), nn.Linear(5, 3, bias=False)), (6,)),
    "frozen_weight": (frozen("b.weight", "a.weight", "n1.bias"), (6,)),
    "frozen_bias": (frozen("a.bias", "c.bias"), (6,)),
    "frozen_layer": (frozen("a.weight", "a.bias", "d.weight", "d.bias"), (6,)),
    "tokens": (Tokens, (4, 6)),
    "token_mlp": (lambda: nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 3), nn.Flatten(1)), (2, 6)),
    "attention": (Attention, (4, 6)),
    "embedded": (Embedded, (6,)),
    "nested": (Nested, (6,)),
    "hooked": (hooked, (6,)),
    "in_place": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.LayerNorm(5), nn.Linear(5, 3)), (6,)),
    "multihead": (Multihead, (4, 6)),
}  # fmt: skip


def make(name, loss="cross_entropy", *, tasks=3, support=4, query=5, outputs=3, seed=0):
    torch.manual_seed(seed)
    factory, shape = MODELS[name]
    model = factory().double()

    def pair(rows):
        x = torch.randn(tasks, rows, *shape, dtype=torch.float64)
        if loss == "mse":
            return x, torch.randn(tasks, rows, outputs, dtype=torch.float64)
        return x, torch.randint(0, outputs, (tasks, rows))

    return model, (*pair(support), *pair(query))


def gradients_of(loss, model):
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, gradients, strict=True))


def oracle(model, batch, loss, lr, steps, first_order=False):
    """MAML as the paper writes it, one task after the other, by autograd through autograd."""
    slow = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses, fasts = [], []
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        fast = slow
        for _ in range(steps):
            support_loss = loss(functional_call(model, fast, (support_x,)), support_y)
            gradients = torch.autograd.grad(
                support_loss,
                list(fast.values()),
                create_graph=not first_order,
                allow_unused=True,
                materialize_grads=True,
            )
            fast = {name: w - lr * g for (name, w), g in zip(fast.items(), gradients, strict=True)}
        losses.append(loss(functional_call(model, fast, (query_x,)), query_y))
        fasts.append(fast)
    losses = torch.stack(losses)
    stacked = {name: torch.stack([fast[name] for fast in fasts]).detach() for name in slow}
    return losses.detach(), gradients_of(losses.mean(), model), stacked


def inner_loop(loss, lr, steps, first_order=False):
    return InnerLoop(lr, steps, first_order, as_loss(loss))


def result(model, batch, inner, engine=ENGINE):
    assert engine.why_not(model, inner, batch[0]) is None
    losses = inner.loss.per_task(engine.query(model, inner, *batch[:3]), batch[3])
    return losses, gradients_of(losses.mean(), model)


def assert_same(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual[0], expected[0], rtol=tolerance, atol=tolerance)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            actual[1][name], gradient, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
