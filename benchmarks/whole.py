"""What stands around a gradient: drawing tasks, and a training step from there to the optimiser."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

import fastmeta.nn
from fastmeta import MAML, ProtoNet, TaskBatch
from fastmeta.dispatch.spec import Make
from fastmeta.tasks import EpisodeSampler, SinusoidTasks

from . import contenders as peers
from .case import Case
from .measure import Contender
from .problems import maml_batch


def _images(make: Make) -> Tensor:
    """As many as Omniglot's training classes have; what is in them makes no difference."""
    return torch.randint(256, (1028, 20, 1, 28, 28), dtype=torch.uint8).to(make.device)


def _episodes_by_loop(images: Tensor, tasks: int, ways: int, shots: int, queries: int) -> TaskBatch:
    """As data sets of tasks have it: a task after the other, a class after the other, then stacked."""
    classes, instances = images.shape[:2]
    support, query = [], []
    for _ in range(tasks):
        rows = []
        for c in torch.randperm(classes * 4)[:ways].tolist():  # with its rotations a class is four
            of_class = images[c // 4][torch.randperm(instances)[: shots + queries].to(images.device)]
            rows.append(torch.rot90(of_class, c % 4, (2, 3)).float() / 255)
        support.append(torch.cat([of_class[:shots] for of_class in rows]))
        query.append(torch.cat([of_class[shots:] for of_class in rows]))
    labels = torch.arange(ways, device=images.device)
    return TaskBatch(
        torch.stack(support), labels.repeat_interleave(shots).repeat(tasks, 1),
        torch.stack(query), labels.repeat_interleave(queries).repeat(tasks, 1),
    )  # fmt: skip


def _sinusoids_by_loop(tasks: int, rows: int, device: torch.device) -> TaskBatch:
    """As the code of MAML's authors has it: a task after the other."""
    xs, ys = [], []
    for _ in range(tasks):
        amplitude, phase = torch.rand(()) * 4.9 + 0.1, torch.rand(()) * torch.pi
        x = torch.rand(2 * rows, 1) * 10 - 5
        xs.append(x)
        ys.append(amplitude * torch.sin(x - phase))
    x, y = torch.stack(xs).to(device), torch.stack(ys).to(device)
    return TaskBatch(x[:, :rows], y[:, :rows], x[:, rows:], y[:, rows:])


def sampling(make: Make) -> Iterator[Case]:
    """What is drawn differs, so nothing is compared but the time."""
    images = _images(make)
    for ways, queries, tasks in ((5, 15, 32), (20, 5, 8)):
        source = EpisodeSampler(images, ways=ways, shots=1, query_shots=queries, rotations=True)
        yield Case(
            f"sampling {ways}way 1shot {queries}query of 28x28 images T{tasks}",
            {"fastmeta": lambda source=source, t=tasks: source.sample(t)},
            0,
            5 * tasks * ways * (1 + queries) * 28 * 28,  # a byte is read, a float written
            yardsticks={
                "task loop": lambda n=ways, q=queries, t=tasks: _episodes_by_loop(images, t, n, 1, q),
            },
        )
    source = SinusoidTasks(device=make.device)
    yield Case(
        "sampling sinusoids of 10 and 10 points T1000",
        {"fastmeta": lambda: source.sample(1000)},
        0,
        2 * 4 * 1000 * 20,
        yardsticks={"task loop": lambda: _sinusoids_by_loop(1000, 10, make.device)},
    )


Gradients = Callable[[TaskBatch], Iterable[Tensor]]


def _step(model: nn.Module, draw: Callable[[], TaskBatch], of: Callable[[nn.Module], Gradients]) -> Contender:
    """Draw tasks, find the gradient, let Adam step: on a net of its own, whose gradients `of` finds."""
    model = copy.deepcopy(model)
    parameters, gradients = list(model.parameters()), of(model)
    optimizer = torch.optim.Adam(parameters, 1e-3)

    def run() -> Tensor:
        for p, gradient in zip(parameters, gradients(draw()), strict=True):
            p.grad = gradient
        optimizer.step()
        return parameters[-1]

    return run


def training_steps(make: Make) -> Iterator[Case]:
    """Everybody from tasks drawn to weights moved; the steps differ, so nothing is compared but the time."""
    tasks = 1000
    model, loss, _, _ = maml_batch((1, 40, 40, 1), 1, 10, 10, 1, make)
    sinusoids = SinusoidTasks(device=make.device)

    def ours(model: nn.Module) -> Gradients:
        maml = MAML(model, inner_lr=0.01, loss="mse")
        return lambda batch: maml.gradients(batch)[1].values()

    def draw() -> TaskBatch:
        return sinusoids.sample(tasks).to(make.dtype)

    yield Case(
        f"training step MAML sinusoid 1-40-40-1 K1 T{tasks}, tasks drawn, Adam",
        {"fastmeta": _step(model, draw, ours)},
        0,
        2 * 4 * tasks * 20,
        yardsticks={
            "torch.func": _step(model, draw, lambda m: lambda batch: peers.maml_by_vmap(m, loss, batch, 0.01, 1)),
            "supervised on the same rows": _step(model, draw, lambda m: lambda batch: peers.supervised(m, loss, batch)),
        },
    )

    ways, queries, images = 20, 5, _images(make)
    source = EpisodeSampler(images, ways=ways, shots=1, query_shots=queries, rotations=True)
    torch.manual_seed(0)
    encoder = fastmeta.nn.conv4(1, 64).to(make.device, make.dtype)

    def prototypical(encoder: nn.Module) -> Gradients:
        learner = ProtoNet(encoder, ways=ways)
        return lambda batch: torch.autograd.grad(learner(batch).loss, list(learner.parameters()))

    def plain(encoder: nn.Module) -> Gradients:
        def gradients(batch: TaskBatch) -> Iterable[Tensor]:
            embedded = encoder(torch.cat([batch.support_x[0], batch.query_x[0]])).unsqueeze(0)
            parts = embedded.split([batch.support_x.shape[1], batch.query_x.shape[1]], 1)
            losses = peers.unfused_prototypical_loss(parts[0], batch.support_y, parts[1], batch.query_y, ways)
            return torch.autograd.grad(losses.mean(), list(encoder.parameters()))

        return gradients

    yield Case(
        f"training step ProtoNet Conv4-64 28x28 {ways}way 1shot {queries}query, tasks drawn, Adam",
        {"fastmeta": _step(encoder, lambda: source.sample(1).to(make.dtype), prototypical)},
        0,
        5 * ways * (1 + queries) * 28 * 28,
        yardsticks={
            "plain PyTorch": _step(
                encoder, lambda: _episodes_by_loop(images, 1, ways, 1, queries).to(make.dtype), plain
            )
        },
    )
