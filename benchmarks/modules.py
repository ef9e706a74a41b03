"""`python -m benchmarks.modules`: every kind of module, the engine that `auto` takes for it, and how fast it is beside
a Python loop over the tasks with `create_graph`. Writes the table of docs/modules.md.

Meta-gradients of MAML in float32, second order, T = 32 tasks (Conv4: 4) of 5 classes, 5 support and 15 query rows (25
and 75 of images: 5 and 75), K = 3; whatever is fastest of three interleaved rounds.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import typer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from fastmeta import MAML
from fastmeta.nn import conv4, mlp
from fastmeta.tasks import TaskBatch

PAGE = Path(__file__).parents[1] / "docs" / "modules.md"
BEGIN, END = "<!-- measured: python -m benchmarks.modules -->", "<!-- end of what was measured -->"
WAYS, STEPS, LR = 5, 3, 0.1


class Kind(NamedTuple):
    name: str
    make: Callable[[], nn.Module]
    example: tuple[int, ...] | None = (32,)  # None: token ids
    tasks: int = 32
    support: int = 5
    query: int = 15


class Recurrent(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.rnn, self.out = getattr(nn, kind)(8, 64, batch_first=True), nn.Linear(64, WAYS)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(32, 64), nn.LayerNorm(64)
        self.inner, self.out = nn.Linear(64, 64), nn.Linear(64, WAYS)

    def forward(self, x):
        h = self.first(x)
        return self.out(h + torch.relu(self.inner(self.norm(h))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.out = nn.Linear(32, WAYS)

    def forward(self, x):
        return self.out(self.layer(x).mean(1))


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(1000, 64, padding_idx=0), nn.Linear(64, WAYS)

    def forward(self, ids):
        return self.out(torch.relu(self.embed(ids)).mean(1))


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.heads = nn.Linear(32, 64), nn.ModuleList([nn.Linear(64, WAYS), nn.Linear(64, WAYS)])
        self.use = 1

    def forward(self, x):
        return self.heads[self.use](torch.relu(self.body(x)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, WAYS)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.out(torch.relu(self.b(torch.relu(self.a(x)))))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 64))
        self.out = nn.Linear(64, WAYS)

    def forward(self, x):
        return self.out(torch.relu(checkpoint(self.block, x, use_reentrant=False)))


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


class OwnFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, WAYS)

    def forward(self, x):
        return self.b(_Reverse.apply(torch.relu(self.a(x))))


def small(*norms: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), *norms, nn.ReLU(), nn.Linear(64, WAYS))


def frozen() -> nn.Module:
    net = mlp([32, 64, 64, WAYS])
    net[1].requires_grad_(False)
    return net


def hooked() -> nn.Module:
    net = small()
    net.kept = []
    net[1].register_forward_hook(lambda module, given, output: net.kept.append(output.detach()))
    return net


def convolutions() -> nn.Module:
    return nn.Sequential(conv4(1, 64, track_running_stats=False), nn.Linear(64, WAYS))


def one_dimensional() -> nn.Module:
    block = (nn.Conv1d(3, 32, 5, padding=2), nn.GroupNorm(4, 32), nn.ReLU(), nn.AdaptiveAvgPool1d(4), nn.Flatten())
    return nn.Sequential(*block, nn.Linear(128, WAYS))


KINDS = [
    Kind("multi-layer perceptron", lambda: mlp([32, 64, 64, WAYS])),
    Kind("perceptron with batch norm", lambda: small(nn.BatchNorm1d(64, track_running_stats=False))),
    Kind("residual, layer norm", Residual),
    Kind("partly frozen", frozen),
    Kind("tied weights", Tied),
    Kind("several heads, chosen by an attribute", Heads),
    Kind("Conv4-64 on 28x28 images", convolutions, (1, 28, 28), 4, 5, 75),
    Kind("1-d convolution, group norm", one_dimensional, (3, 64)),
    Kind("LSTM, 20 steps", lambda: Recurrent("LSTM"), (20, 8)),
    Kind("GRU, 20 steps", lambda: Recurrent("GRU"), (20, 8)),
    Kind("RNN, 20 steps", lambda: Recurrent("RNN"), (20, 8)),
    Kind("transformer encoder layer, 16 positions", Transformer, (16, 32)),
    Kind("text: embedding, mean, linear", Text, None),
    Kind("weight norm", lambda: nn.Sequential(weight_norm(nn.Linear(32, 64)), nn.ReLU(), nn.Linear(64, WAYS))),
    Kind("spectral norm", lambda: nn.Sequential(spectral_norm(nn.Linear(32, 64)), nn.ReLU(), nn.Linear(64, WAYS))),
    Kind("checkpointed block", Checkpointed),
    Kind("an autograd.Function of your own", OwnFunction),
    Kind("forward hooks", hooked),
]


def batch_for(kind: Kind) -> TaskBatch:
    def part(rows):
        shape = (kind.tasks, rows)
        x = torch.randint(1, 1000, (*shape, 12)) if kind.example is None else torch.randn(*shape, *kind.example)
        return x, torch.arange(WAYS).repeat(rows // WAYS).expand(shape)

    return TaskBatch(*part(kind.support), *part(kind.query))


def loop(net: nn.Module, batch: TaskBatch) -> list[Tensor]:
    """The gradient as MAML repositories have it, with the memory of one task."""
    slow = dict(net.named_parameters())
    wanted = [p for p in slow.values() if p.requires_grad]
    total = [torch.zeros_like(p) for p in wanted]

    def run(weights, x):  # what `forward` writes into buffers is dropped
        return functional_call(net, (weights, {name: b.clone() for name, b in net.named_buffers()}), (x,))

    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        weights = {name: p for name, p in slow.items() if p.requires_grad}
        for _ in range(STEPS):
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
                value = F.cross_entropy(run(weights, support_x), support_y)
            found = torch.autograd.grad(value, list(weights.values()), create_graph=True, materialize_grads=True)
            weights = {name: w - LR * g for (name, w), g in zip(weights.items(), found, strict=True)}
        value = F.cross_entropy(run(weights, query_x), query_y) / batch.num_tasks
        for so_far, gradient in zip(total, torch.autograd.grad(value, wanted, materialize_grads=True), strict=True):
            so_far.add_(gradient)
    return total


def engine_of(maml: MAML, batch: TaskBatch) -> str:
    picked = (line for line in maml.explain(batch).splitlines() if ": picked" in line)
    return next(picked).split(":")[0].strip()


def measured(kind: Kind, rounds: int = 3) -> tuple[str, float]:
    """The engine, and how many times as fast as the loop."""
    torch.manual_seed(0)
    net, batch = kind.make(), batch_for(kind)
    maml = MAML(net, inner_lr=LR, inner_steps=STEPS)
    ways = {"loop": lambda: loop(net, batch), "auto": lambda: maml.gradients(batch)}
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return engine_of(maml, batch), best["loop"] / best["auto"]


def main() -> None:
    """Measure every kind of module and write the table of docs/modules.md."""
    warnings.simplefilter("ignore")
    rows = ["| kind | engine | times as fast as a loop |", "|---|---|---|"]
    for kind in KINDS:
        engine, ratio = measured(kind)
        rows.append(f"| {kind.name} | `{engine}` | {ratio:.2g} |")
        print(rows[-1], flush=True)
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + "\n".join([BEGIN, "", *rows, "", END]) + rest.split(END)[1])


if __name__ == "__main__":
    typer.run(main)
