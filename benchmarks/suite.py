"""The workloads: each a dictionary of contenders that do the same work, ours first, and what it must reach."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

import fastmeta.nn
from fastmeta import MAML, ProtoNet, TaskBatch, functional
from fastmeta.dispatch.spec import REGISTRY, Make
from fastmeta.functional.optimizer_steps import AdamState

from . import contenders as peers
from . import counts, curves, learners, whole
from .case import Case
from .conv import ops as convolutional
from .conv import rows as conv_rows
from .measure import Contender
from .problems import episodes, maml_batch, rows_and_gradients


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
                total = loss(support, labels[0], query, labels[1], ways).mean()
                return total, torch.autograd.grad(total, (support, query))

            return run

        rows = {
            "fastmeta": with_gradient(lambda *args: functional.prototypical_loss(*args)[0]),
            "unfused": with_gradient(peers.unfused_prototypical_loss),
            "KeOps": with_gradient(peers.prototypical_loss_by_keops),
            "compiled": with_gradient(compiled(peers.unfused_prototypical_loss)),
        }
        if index == 0:
            rows["materialised [T,Q,N,D]"] = with_gradient(peers.materialised_prototypical_loss)
        # the product and its two adjoints; both inputs and their gradients
        yield Case(f"prototypical_loss fwd+bwd {workload.label}", rows, 3 * workload.flops, 2 * workload.bytes, bars)


def _weighted(ours: Callable, peers_losses: dict[str, Callable], weights, leaves) -> dict[str, dict[str, Contender]]:
    """`ours(task_weights)` and what is multiplied with weights by hand, differentiated; and ours without weights."""

    def with_gradient(losses):
        def run():
            total = losses().mean()
            return total, torch.autograd.grad(total, leaves)

        return run

    rows = {"fastmeta": with_gradient(lambda: ours(weights)), "by hand": with_gradient(lambda: weights * ours(None))}
    rows |= {name: with_gradient(lambda loss=loss: weights * loss()) for name, loss in peers_losses.items()}
    return {"contenders": rows, "yardsticks": {"without weights": with_gradient(lambda: ours(None))}}


def task_weights(make: Make) -> Iterator[Case]:
    """Weighted means of the tasks' losses cost what their mean does."""
    at_most = {"without weights": 1.1}
    workload = _workload("prototypical_loss", 0, make)
    support, support_labels, query, query_labels, ways, _ = workload.args
    episode = support.requires_grad_(), support_labels, query.requires_grad_(), query_labels, ways
    backward = REGISTRY["prototypical_loss_bwd"]
    weights = make.uniform(0, 2, len(support))

    def in_two_ops():
        with torch.no_grad():
            loss = functional.prototypical_loss(*episode)[0]
            return (weights * loss).mean(), backward(weights / len(weights), *episode, "sqeuclidean", 3)

    runs = _weighted(
        lambda w: functional.prototypical_loss(*episode, weights=w)[0],
        {"unfused": lambda: peers.unfused_prototypical_loss(*episode)},
        weights,
        (support, query),
    )
    runs["contenders"]["backward op"] = in_two_ops
    work = {"flops": 3 * workload.flops, "bytes": 2 * workload.bytes}
    yield Case(f"weighted prototypical_loss fwd+bwd {workload.label}", **runs, **work, at_most=at_most)

    sizes, tasks = (1, 40, 40, 1), 1000
    model, _, batch, maml = maml_batch(sizes, tasks, 10, 10, 1, make)
    parameters = list(model.parameters())
    layers = [p for p in parameters if p.dim() == 2], [p for p in parameters if p.dim() == 1]
    options = {"lr": 0.01, "steps": 1, "loss": "mse", "activation": "relu"}

    def meta_losses(w):
        return functional.meta_loss_mlp(*batch, *layers, **options, task_weights=w).loss

    weights = make.uniform(0, 2, tasks)
    runs = _weighted(meta_losses, {}, weights, parameters)

    def without_graph():
        output, gradients = maml.gradients(batch, weights)
        return output.loss, tuple(gradients.values())

    runs["contenders"]["MAML.gradients"] = without_graph
    work = {"flops": counts.maml(sizes, tasks, 10, 10, 1), "bytes": rows_and_gradients(model, batch)}
    yield Case("weighted meta_loss_mlp sinusoid 1-40-40-1 K1 T1000", **runs, **work, at_most=at_most)


def contrastive_losses(make: Make) -> Iterator[Case]:
    for index, label in enumerate(("T1-B512-D64", "T1-B4096-D128")):
        workload = _workload("contrastive_loss", index, make)
        embeddings, temperature = workload.args
        embeddings = embeddings.requires_grad_()

        def with_gradient(loss, embeddings=embeddings, temperature=temperature):
            def run():
                total = loss(embeddings, temperature).sum()
                return total, torch.autograd.grad(total, embeddings)

            return run

        rows = {
            "fastmeta": with_gradient(REGISTRY["contrastive_loss"]),
            "matrix": with_gradient(peers.nt_xent),
            "compiled": with_gradient(compiled(peers.nt_xent)),
        }
        absent = {}
        if embeddings.shape[1] <= curves.MOST_KEOPS or make.device.type != "cpu":
            rows["KeOps"] = with_gradient(peers.nt_xent_by_keops)
        else:
            absent["KeOps"] = f"left out above {curves.MOST_KEOPS:,} rows on a CPU: seconds a call at this width"
        # scores are symmetric, half a product; their gradient by the rows is a whole one
        work = {"flops": 3 * workload.flops, "bytes": 2 * workload.bytes}
        yield Case(f"contrastive_loss fwd+bwd {label}", rows, **work, absent=absent)


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
        yield Case(f"pairwise_distance fwd {workload.label}", rows, workload.flops, workload.bytes, bars)


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
    yield Case(f"fast_weight_update fwd {workload.label}", rows, workload.flops, workload.bytes, bars)

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
    # besides the forward's: cotangents in, gradients of gradients and rates out; those of params are the cotangents
    nbytes = workload.bytes + counts.nbytes([*cotangents, *grads, *flat_lrs])
    flops = 5 * workload.flops // 2  # a multiply-add forward, a product and a multiply-add backward
    yield Case(f"fast_weight_update fwd+bwd {workload.label}", rows, flops, nbytes, bars)


def optimizer_steps(make: Make) -> Iterator[Case]:
    """A step of Adam in the midst of others, and its gradient with respect to all that it was given."""
    workload = _workload("adam_step", 0, make)
    given, n = [t.clone() for tensors in workload.args[:4] for t in tensors], len(workload.args[0])
    leaves, step = [t.requires_grad_() for t in given], 3
    cotangents = [make.normal(*t.shape) for t in workload.args[0]]
    options = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}

    def ours(params, grads, means, squares):
        moved, state = functional.adam_step(params, grads, AdamState(step - 1, means, squares), **options)
        return moved, state.exp_avg, state.exp_avg_sq

    def with_gradient(adam):
        def run():
            moved, means, squares = adam(*(leaves[i * n : i * n + n] for i in range(4)))
            return moved, means, squares, torch.autograd.grad(moved, leaves, cotangents)

        return run

    rows = {
        "fastmeta": with_gradient(ours),
        "foreach": with_gradient(lambda *tensors: peers.adam_by_foreach(*tensors, *options.values(), step)),
        "TorchOpt": with_gradient(lambda *tensors: peers.adam_by_torchopt(*tensors, *options.values(), step)),
    }
    # forward four arrays in and three out; backward these four and the cotangents in, and four out
    nbytes = 16 * counts.nbytes(workload.args[0])
    yield Case(f"adam_step fwd+bwd {workload.label}", rows, 3 * workload.flops, nbytes, {"foreach": 2, "TorchOpt": 3})


def mlps(make: Make) -> Iterator[Case]:
    for index, bar in enumerate((3, 1.2)):
        workload = _workload("functional_mlp", index, make)
        x, weights, biases, _ = workload.args
        rows = {
            "fastmeta": lambda x=x, w=weights, b=biases: functional.functional_mlp(x, w, b),
            "baddbmm chain": lambda x=x, w=weights, b=biases: peers.mlp_by_baddbmm(x, w, b),
        }
        bars = {"baddbmm chain": bar}
        yield Case(f"functional_mlp fwd {workload.label}", rows, workload.flops, workload.bytes, bars)


def _later(build: Callable[[], Contender]) -> Contender:
    """What `build` makes, which is made when it is first called: a package that is not installed is missed then."""
    made: list[Contender] = []

    def run():
        if not made:
            made.append(build())
        return made[0]()

    return run


def mamls(make: Make) -> Iterator[Case]:
    # name, widths, tasks, support and query rows, steps, times faster than every peer, at most times supervised
    settings = (
        ("sinusoid 1-40-40-1 K1 T1000", (1, 40, 40, 1), 1000, 10, 10, 1, 5, None),
        ("sinusoid 1-40-40-1 K5 T1000", (1, 40, 40, 1), 1000, 10, 10, 5, 7, None),
        ("sinusoid 1-40-40-1 K1 T25", (1, 40, 40, 1), 25, 10, 10, 1, 3, None),
        ("images 784-64-64-5 K5 T32", (784, 64, 64, 5), 32, 5, 75, 5, 4, 1.5),
        ("images 784-64-64-5 K5 T256", (784, 64, 64, 5), 256, 5, 75, 5, 4, 1.5),
        ("images 784-256-128-64-64-5 K5 T32", (784, 256, 128, 64, 64, 5), 32, 5, 75, 5, 4, 1.7),
    )
    for title, sizes, tasks, shots, queries, steps, faster, at_most in settings:
        model, loss, batch, maml = maml_batch(sizes, tasks, shots, queries, steps, make)
        regression = sizes[-1] == 1
        rows = {
            "fastmeta": lambda maml=maml, batch=batch: list(maml.gradients(batch)[1].values()),
            "torch.func": lambda m=model, f=loss, b=batch, k=steps: peers.maml_by_vmap(m, f, b, 0.01, k),
            "torch.func compiled": peers.maml_compiled(model, loss, batch, 0.01, steps),
        }
        if tasks <= 32:  # a minute each for a thousand tasks
            for name, peer in peers.LOOPS.items():
                rows[name] = lambda m=model, f=loss, b=batch, k=steps, peer=peer: peer(m, f, b, 0.01, k)
        rows["JAX jit"] = _later(lambda m=model, r=regression, b=batch, k=steps: peers.maml_by_jax(m, r, b, 0.01, k))
        case = Case(
            f"MAML meta-gradient {title}",
            rows,
            counts.maml(sizes, tasks, shots, queries, steps),
            rows_and_gradients(model, batch),
            {peer: faster for peer in rows if peer != "fastmeta"},
            yardsticks={
                "supervised on the same rows": lambda m=model, f=loss, b=batch: peers.supervised(m, f, b),
                "fastmeta, a graph and its backward": lambda maml=maml, batch=batch: torch.autograd.grad(
                    maml(batch).loss, list(maml.parameters())
                ),
            },
            at_most={} if at_most is None else {"supervised on the same rows": at_most},
        )
        yield case
        if make.device.type == "cuda":
            yield _in_cuda_graphs(case)


GRAPHED = ("fastmeta", "torch.func", "supervised on the same rows")  # what a CUDA graph can record


def _in_cuda_graphs(case: Case) -> Case:
    """The same without Python and launches; JAX's one call as it is."""

    def recorded(runs: dict[str, Contender]) -> dict[str, Contender]:
        graphs = {name: peers.in_cuda_graph(run) for name, run in runs.items() if name in GRAPHED}
        return graphs | {name: run for name, run in runs.items() if name == "JAX jit"}

    rows = recorded(case.contenders)
    bars = {name: bar for name, bar in case.bars.items() if name in rows}
    yardsticks = recorded(case.yardsticks)
    return dataclasses.replace(case, name=f"{case.name}, CUDA graph", contenders=rows, bars=bars, yardsticks=yardsticks)


class Residual(torch.nn.Module):
    """784-128-128-128-5 with layer norms and residual connections: no chain of layers that formulas could serve."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.first, self.head = torch.nn.Linear(784, width), torch.nn.Linear(width, 5)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(2))
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in range(3))

    def forward(self, x):
        h = torch.relu(self.norms[0](self.first(x)))
        for block, norm in zip(self.blocks, self.norms[1:], strict=True):
            h = h + torch.relu(norm(block(h)))
        return self.head(h)


def modules(make: Make) -> Iterator[Case]:
    torch.manual_seed(0)
    model = Residual().to(make.device, make.dtype)
    tasks, ways, queries, steps = 128, 5, 75, 5
    batch = TaskBatch(
        make.normal(tasks, ways, 784), make.balanced_labels(tasks, ways, 1), make.normal(tasks, queries, 784),
        make.labels(ways, tasks, queries),
    )  # fmt: skip

    def meta_gradient(engine):
        maml = MAML(model, inner_lr=0.01, inner_steps=steps, engine=engine)
        return lambda: torch.autograd.grad(maml(batch).loss, list(maml.parameters()))

    yield Case(
        "MAML meta-gradient residual net 784-128-128-128-5 with LayerNorm K5 T128",
        {"fastmeta": meta_gradient("auto"), "vmap engine": meta_gradient("vmap")},
        counts.maml((784, 128, 128, 128, 5), tasks, ways, queries, steps),  # sums of layers cost no products
        rows_and_gradients(model, batch),
        {"vmap engine": 5},
        yardsticks={"supervised on the same rows": lambda: peers.supervised(model, F.cross_entropy, batch)},
    )


# rows of `python -m benchmarks.conv`, and who of the peers there is named how here
CONVOLUTIONAL = ("conv4-1shot-k1-t4", "conv4-1shot-k5-t4", "conv4-84-k5-t4", "sensors", "resnet12-first-order")
OF_CONV = {
    "task loop": ("task loop, channels_last", "task loop"),
    "torch.func, norm written out": ("torch.func vmap(grad), norm written out",),
    "grouped convolution": ("grouped convolution",),
    "supervised on the same rows": ("supervised, channels_last, pool before ReLU", "supervised"),
}


def convolutions(make: Make) -> Iterator[Case]:
    for key in CONVOLUTIONAL:
        row = conv_rows.ROWS[key]

        def problem(row=row):  # the same each time, and everybody's own: nobody leaves anything in another's net
            return row.make(Make(make.dtype, make.device), False)

        def chosen(builders, problem=problem):
            found = {name: next((builders[n] for n in named if n in builders), None) for name, named in OF_CONV.items()}
            return {n: _later(lambda build=build: build(problem())) for n, build in found.items() if build is not None}

        whole = problem()
        yield Case(
            f"MAML meta-gradient {row.title}",
            {"fastmeta": row.ours(problem()), **chosen(row.peers)},
            0,  # not counted: a convolution has forms of fewer multiplications than its definition (Winograd's)
            rows_and_gradients(whole.model, whole.batch),
            {"task loop": row.faster},
            yardsticks=chosen(row.yardsticks),
            at_most={} if row.at_most is None else {"supervised on the same rows": row.at_most},
            rtol=0.05,  # one winner of a pool may be another; the rows themselves compare in float64
            quick=key == "conv4-1shot-k1-t4",
        )


def protonets(make: Make) -> Iterator[Case]:
    ways, shots, queries, tasks = 5, 1, 5, 16
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Flatten(), fastmeta.nn.mlp((784, 64, 64))).to(make.device, make.dtype)
    batch = episodes(make, tasks, ways, shots, queries, 1, 28, 28)
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
    distances = 3 * 2 * tasks * (ways * queries) * ways * 64
    yield Case(
        f"ProtoNet gradient 784-64-64 {ways}way {shots}shot {queries}query T{tasks}",
        rows,
        counts.supervised((784, 64, 64), tasks * ways * (shots + queries)) + distances,
        rows_and_gradients(encoder, batch),
    )


GROUPS: dict[str, Callable[[Make], Iterator[Case]]] = {
    "prototypical_loss": prototypical_losses,
    "contrastive_loss": contrastive_losses,
    "pairwise_distance": distances,
    "fast_weight_update": updates,
    "optimizer_step": optimizer_steps,
    "functional_mlp": mlps,
    "task_weights": task_weights,
    "task_conv2d": convolutional.convolutions,
    "norm_act_pool": convolutional.blocks,
    "maml": mamls,
    "maml_module": modules,
    "maml_conv": convolutions,
    "protonet": protonets,
    "meta_sgd": learners.meta_sgd,
    "hypernetwork": learners.hypernetworks,
    "in_context": learners.in_context,
    "sampling": whole.sampling,
    "training_step": whole.training_steps,
    "curves": curves.curves,
}

# everybody whom a group may name beside fastmeta
PEERS = (
    "unfused", "compiled", "materialised [T,Q,N,D]", "KeOps", "by hand", "backward op", "without weights",
    "MAML.gradients", "matrix", "bmm", "cdist", "foreach", "addcmul loop", "baddbmm chain", "torch.func",
    "torch.func compiled", "task loop", "learn2learn-like loop", "learn2learn", "higher", "TorchOpt", "JAX jit",
    "supervised on the same rows", "fastmeta, a graph and its backward", "vmap engine", "grouped", "vmap",
    "task loop, pool before ReLU", "task loop, pool after ReLU", "torch.func, norm written out", "grouped convolution",
    "plain PyTorch", "fastmeta, support encoded once",
)  # fmt: skip
