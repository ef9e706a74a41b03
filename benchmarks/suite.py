"""The workloads: each a dictionary of contenders that do the same work, ours first, and what it must reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import fastmeta.nn
from benchmarks import contenders as peers
from benchmarks.measure import Contender
from fastmeta import MAML, ProtoNet, TaskBatch, functional
from fastmeta._spec import REGISTRY, Make


@dataclass(frozen=True)
class Case:
    """One workload: `bars` gives for each peer the ratio of medians (peer over ours) to reach."""

    name: str
    contenders: dict[str, Contender]
    bars: dict[str, float] = field(default_factory=dict)
    flops: float = 0
    bytes: float = 0


def compiled(function: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def _workload(name: str, index: int, make: Make):
    return list(REGISTRY[name].workloads(make))[index]


def prototypical_losses(make: Make) -> Iterator[Case]:
    for index, bars in enumerate(({"unfused": 4, "compiled": 2}, {"unfused": 2, "compiled": 1.2})):
        workload = _workload("prototypical_loss", index, make)
        support, support_labels, query, query_labels, ways, _ = workload.args
        support, query = support.requires_grad_(), query.requires_grad_()

        def with_gradient(loss, support=support, query=query, labels=(support_labels, query_labels), ways=ways):
            def run():
                total = loss(support, labels[0], query, labels[1], ways).sum()
                return total, torch.autograd.grad(total, (support, query))

            return run

        rows = {
            "fastmeta": with_gradient(lambda *args: functional.prototypical_loss(*args)[0]),
            "unfused": with_gradient(peers.unfused_prototypical_loss),
            "compiled": with_gradient(compiled(peers.unfused_prototypical_loss)),
        }
        if index == 0:
            rows["materialised [T,Q,N,D]"] = with_gradient(peers.materialised_prototypical_loss)
        # forward, and in the backward the forward again and two products
        yield Case(f"prototypical_loss fwd+bwd {workload.label}", rows, bars, 4 * workload.flops, 2 * workload.bytes)


def distances(make: Make) -> Iterator[Case]:
    for index, bar in enumerate((1.5, 1.0)):
        workload = _workload("pairwise_distance", index, make)
        query, prototypes, _ = workload.args
        bmm_compiled = compiled(peers.squared_distance_by_bmm)
        rows = {
            "fastmeta": lambda q=query, p=prototypes: functional.pairwise_distance(q, p),
            "bmm": lambda q=query, p=prototypes: peers.squared_distance_by_bmm(q, p),
            "cdist": lambda q=query, p=prototypes: peers.squared_distance_by_cdist(q, p),
            "compiled": lambda q=query, p=prototypes, f=bmm_compiled: f(q, p),
        }
        bars = dict.fromkeys(("bmm", "cdist", "compiled"), bar)
        yield Case(f"pairwise_distance fwd {workload.label}", rows, bars, workload.flops, workload.bytes)


def updates(make: Make) -> Iterator[Case]:
    workload = _workload("fast_weight_update", 0, make)
    params, grads, lrs, _ = workload.args
    flat_lrs = [lr[0] for lr in lrs]
    rows = {
        "fastmeta": lambda: functional.fast_weight_update(params, grads, flat_lrs),
        "foreach": lambda: peers.update_by_foreach(params, grads, lrs),
        "addcmul loop": lambda: peers.update_by_addcmul(params, grads, lrs),
    }
    bars = {"foreach": 1.5, "addcmul loop": 1.0}
    yield Case(f"fast_weight_update fwd {workload.label}", rows, bars, workload.flops, workload.bytes)

    leaves = [t.clone().requires_grad_() for t in [*params, *grads, *flat_lrs]]
    n = len(params)
    cotangents = [torch.ones_like(p) for p in params]

    def with_gradient(update):
        def run():
            outs = update(leaves[:n], leaves[n : 2 * n], leaves[2 * n :])
            return outs, torch.autograd.grad(outs, leaves, cotangents)

        return run

    rows = {
        "fastmeta": with_gradient(functional.fast_weight_update),
        "foreach": with_gradient(peers.update_by_foreach),
        "addcmul loop": with_gradient(peers.update_by_addcmul),
    }
    yield Case(f"fast_weight_update fwd+bwd {workload.label}", rows, bars, 3 * workload.flops, 2 * workload.bytes)


def mlps(make: Make) -> Iterator[Case]:
    for index, bar in enumerate((3, 1.2)):
        workload = _workload("functional_mlp", index, make)
        x, weights, biases, _ = workload.args
        rows = {
            "fastmeta": lambda x=x, w=weights, b=biases: functional.functional_mlp(x, w, b),
            "baddbmm chain": lambda x=x, w=weights, b=biases: peers.mlp_by_baddbmm(x, w, b),
        }
        yield Case(f"functional_mlp fwd {workload.label}", rows, {"baddbmm chain": bar}, workload.flops, workload.bytes)


def mamls(make: Make) -> Iterator[Case]:
    settings = (
        ("sinusoid 1-40-40-1 K1 T1000", (1, 40, 40, 1), 1000, 10, 10, 1),
        ("sinusoid 1-40-40-1 K5 T1000", (1, 40, 40, 1), 1000, 10, 10, 5),
        ("sinusoid 1-40-40-1 K1 T25", (1, 40, 40, 1), 25, 10, 10, 1),
        ("images 784-64-64-5 K5 T32", (784, 64, 64, 5), 32, 5, 75, 5),
    )
    for name, sizes, tasks, shots, queries, steps in settings:
        torch.manual_seed(0)
        model = fastmeta.nn.mlp(sizes).to(make.device, make.dtype)
        regression = sizes[-1] == 1
        loss = F.mse_loss if regression else F.cross_entropy

        def targets(rows, tasks=tasks, sizes=sizes, regression=regression):
            return make.normal(tasks, rows, 1) if regression else make.labels(sizes[-1], tasks, rows)

        batch = TaskBatch(
            make.normal(tasks, shots, sizes[0]), targets(shots), make.normal(tasks, queries, sizes[0]), targets(queries)
        )
        maml = MAML(model, inner_lr=0.01, inner_steps=steps, loss="mse" if regression else "cross_entropy")
        rows = {
            "fastmeta": lambda maml=maml, batch=batch: torch.autograd.grad(maml(batch).loss, list(maml.parameters())),
            "torch.func": lambda m=model, f=loss, b=batch, k=steps: peers.maml_by_vmap(m, f, b, 0.01, k),
            "task loop": lambda m=model, f=loss, b=batch, k=steps: peers.maml_by_loop(m, f, b, 0.01, k),
        }
        yield Case(f"MAML meta-gradient {name}", rows)
        # not the same result, hence a case of its own: what the same rows cost without any adaptation
        yield Case(
            f"supervised on the rows of {name}",
            {"supervised": lambda m=model, f=loss, b=batch: peers.supervised(m, f, b)},
        )


def protonets(make: Make) -> Iterator[Case]:
    ways, shots, queries, tasks = 5, 1, 5, 16
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Flatten(), fastmeta.nn.mlp((784, 64, 64))).to(make.device, make.dtype)
    batch = TaskBatch(
        make.normal(tasks, ways * shots, 1, 28, 28),
        make.balanced_labels(tasks, ways, shots),
        make.normal(tasks, ways * queries, 1, 28, 28),
        make.balanced_labels(tasks, ways, queries),
    )
    model = ProtoNet(encoder, ways=ways)

    def vmapped():
        params = dict(encoder.named_parameters())

        def one(params, support_x, support_y, query_x, query_y):
            embed = lambda x: torch.func.functional_call(encoder, params, (x,))  # noqa: E731
            one_hot = F.one_hot(support_y, ways).to(support_x.dtype)
            prototypes = one_hot.T @ embed(support_x) / one_hot.sum(0).unsqueeze(1)
            logits = -(embed(query_x).unsqueeze(1) - prototypes).square().sum(-1)
            return F.cross_entropy(logits, query_y)

        losses = torch.func.vmap(one, in_dims=(None, 0, 0, 0, 0))(params, *batch)
        return torch.autograd.grad(losses.mean(), list(encoder.parameters()))

    rows = {
        "fastmeta": lambda: torch.autograd.grad(model(batch).loss, list(model.parameters())),
        "torch.func": vmapped,
        "task loop": lambda: peers.protonet_by_loop(encoder, batch, ways),
    }
    yield Case(f"ProtoNet gradient 784-64-64 {ways}way {shots}shot {queries}query T{tasks}", rows)


GROUPS: dict[str, Callable[[Make], Iterator[Case]]] = {
    "prototypical_loss": prototypical_losses,
    "pairwise_distance": distances,
    "fast_weight_update": updates,
    "functional_mlp": mlps,
    "maml": mamls,
    "protonet": protonets,
}
