"""Learners other than MAML and Prototypical Networks: Meta-SGD, a hypernetwork, an in-context learner."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from fastmeta import TaskBatch
from fastmeta.algorithms import Hypernetwork, InContextCAML, MetaSGD
from fastmeta.dispatch.spec import Make

from . import contenders as peers
from . import counts
from .case import Case
from .measure import Contender
from .problems import episodes, maml_batch, rows_and_gradients


def meta_sgd(make: Make) -> Iterator[Case]:
    """The gradient of the weights and of a rate for each."""
    settings = (
        ("sinusoid 1-40-40-1 K1 T1000", (1, 40, 40, 1), 1000, 10, 10),
        ("images 784-64-64-5 K1 T32", (784, 64, 64, 5), 32, 5, 75),
    )
    for name, sizes, tasks, shots, queries in settings:
        model, loss, batch, _ = maml_batch(sizes, tasks, shots, queries, 1, make)
        learner = MetaSGD(model, loss="mse" if loss is F.mse_loss else "cross_entropy").to(make.device, make.dtype)
        params = dict(model.named_parameters())
        rates = {name: learner.rates[name.replace(".", "/")] for name in params}
        wanted = [*params.values(), *rates.values()]

        def mapped(model=model, loss=loss, batch=batch, params=params, rates=rates, wanted=wanted):
            def one(params, rates, *task):
                return peers.task_query_loss(model, params, loss, *task, rates, 1)

            return torch.autograd.grad(vmap(one, (None, None, 0, 0, 0, 0))(params, rates, *batch).mean(), wanted)

        def loop(model=model, loss=loss, batch=batch, params=params, rates=rates, wanted=wanted):
            losses = [peers.task_query_loss(model, params, loss, *t, rates, 1) for t in zip(*batch, strict=True)]
            return torch.autograd.grad(sum(losses) / len(losses), wanted)

        rows = {
            "fastmeta": lambda learner=learner, b=batch, w=wanted: torch.autograd.grad(learner(b).loss, w),
            "torch.func": mapped,
        }
        if tasks <= 32:
            rows["task loop"] = loop
        yield Case(
            f"Meta-SGD gradient {name}",
            rows,
            counts.maml(sizes, tasks, shots, queries, 1),
            rows_and_gradients(learner, batch),
            yardsticks={"supervised on the same rows": lambda m=model, f=loss, b=batch: peers.supervised(m, f, b)},
        )


def _gradient(loss, model: nn.Module, batch: TaskBatch) -> Contender:
    return lambda: torch.autograd.grad(loss(model, batch), list(model.parameters()))


def _ours(model: nn.Module, batch: TaskBatch) -> Tensor:
    return model(batch).loss


def _one_by_one(loss):
    """The mean over the tasks of `loss` of one."""

    def mean(model: nn.Module, batch: TaskBatch) -> Tensor:
        tasks = batch.num_tasks
        return sum(loss(model, TaskBatch(*(part[t : t + 1] for part in batch))) for t in range(tasks)) / tasks

    return mean


def _generated(model: Hypernetwork, batch: TaskBatch) -> Tensor:
    """The loss of a hypernetwork that writes all weights, in torch's products of matrices."""
    support, query = model.encoder(batch.support_x), model.encoder(batch.query_x)
    one_hot = F.one_hot(batch.support_y).to(support.dtype)
    classes = one_hot.mT @ model.of_example(support) / one_hot.sum(1).unsqueeze(2)
    task = model.of_class(classes).mean(1)
    head = model.head(torch.cat([classes, task.unsqueeze(1).expand_as(classes)], 2))
    for layer, generator in zip(model.shared, model.layers, strict=True):
        matrix, shift = generator(task).split([layer.weight.numel(), len(layer.bias)], 1)
        weight = layer.weight + matrix.unflatten(1, layer.weight.shape)
        query = torch.relu(torch.baddbmm((layer.bias + shift).unsqueeze(1), query, weight.mT))
    logits = torch.baddbmm(head[..., -1].unsqueeze(1), query, head[..., :-1].mT)
    return F.cross_entropy(logits.flatten(0, 1), batch.query_y.flatten())


def hypernetworks(make: Make) -> Iterator[Case]:
    torch.manual_seed(0)
    batch = episodes(make, 32, 5, 1, 15, 64)
    model = Hypernetwork(nn.Identity(), 64, mode="full", hidden=(64,)).to(make.device, make.dtype)
    yield Case(
        "Hypernetwork gradient 64-64-5, all weights generated, 5way 1shot 15query T32",
        {
            "fastmeta": _gradient(_ours, model, batch),
            "plain PyTorch": _gradient(_generated, model, batch),
            "task loop": _gradient(_one_by_one(_generated), model, batch),
        },
        0,
        rows_and_gradients(model, batch),
    )


def _in_context(model: InContextCAML, batch: TaskBatch) -> Tensor:
    """The loss of an in-context learner: a sequence for each query, the query first."""
    tasks, queries = batch.query_x.shape[:2]
    support = torch.cat([model.norm(batch.support_x), model.code_scale * model.code[batch.support_y]], 2)
    query = torch.cat([model.norm(batch.query_x), model.unknown.expand(tasks, queries, -1)], 2)
    context = support.unsqueeze(1).expand(-1, queries, -1, -1)
    read = model.transformer(torch.cat([query.unsqueeze(2), context], 2).flatten(0, 1))
    return F.cross_entropy(model.head(read[:, 0]), batch.query_y.flatten())


def in_context(make: Make) -> Iterator[Case]:
    batch = episodes(make, 16, 5, 5, 3, 64)

    def learner(query_in_context: bool) -> InContextCAML:
        torch.manual_seed(0)
        model = InContextCAML(nn.Identity(), 64, query_in_context=query_in_context)
        return model.to(make.device, make.dtype)

    model = learner(True)
    yield Case(
        "In-context CAML gradient, 2 layers of width 128, 5way 5shot 3query T16",
        {
            "fastmeta": _gradient(_ours, model, batch),
            "task loop": _gradient(_one_by_one(_in_context), model, batch),
        },
        0,
        rows_and_gradients(model, batch),
        yardsticks={"fastmeta, support encoded once": _gradient(_ours, learner(False), batch)},
    )
