"""The rows: which problem, who does the same work, and what the figures must reach."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import nn

import fastmeta
from fastmeta import MAML, ProtoNet
from fastmeta.dispatch.spec import Make

from ..contenders import in_cuda_graph
from ..measure import Contender
from . import peers, problem
from .peers import FORMATS
from .problem import Problem

Build = Callable[[Problem], Contender]


def maml(problem: Problem, **options) -> MAML:
    steps = {"inner_lr": problem.lr, "inner_steps": problem.steps, "first_order": problem.first_order}
    return MAML(problem.model, **steps, **options)


def backward_of(learner: nn.Module, batch) -> Contender:
    """A training step as users write it, without the optimizer's part."""

    def run():
        learner.zero_grad()
        learner(batch).loss.backward()
        return [p.grad for p in learner.parameters()]

    return run


def accelerated(problem: Problem) -> Contender:
    """`vmap(grad(...))` as `torch.func`'s tutorials have it, of a net that `fastmeta.accelerate` was given."""
    return peers.vmap_of_grad(dataclasses.replace(problem, model=fastmeta.accelerate(problem.model)))


def captured(problem: Problem, build: Build) -> Contender:
    """Ours, recorded and launched as a whole."""
    run = build(problem)
    step = fastmeta.capture(lambda _: run(), warmup=1)
    for _ in range(2):  # one as it is, one that is recorded
        step(problem.batch.support_x)
    return lambda: step(problem.batch.support_x)


def graphed(problem: Problem, build: Build) -> Contender:
    return in_cuda_graph(build(problem))


def _jax(problem: Problem, mapped: bool) -> Contender:
    if importlib.util.find_spec("jax") is None:
        raise ModuleNotFoundError("jax is not installed (benchmarks/requirements.txt)")
    from . import peers_jax

    return peers_jax.maml(problem, mapped)


LOOPS: dict[str, Build] = {
    f"task loop, {name}": partial(peers.loop, memory_format=layout) for name, layout in FORMATS.items()
}
COMPILED: dict[str, Build] = {"task loop, torch.compile": peers.compiled_loop}
VMAP: dict[str, Build] = {
    "torch.func vmap(grad)": peers.vmap_of_grad,
    "torch.func vmap(grad), norm written out": peers.vmap_of_grad_written_out,
    "torch.func vmap of the forward": partial(peers.at_once, forward=peers.mapped),
}
TRICKS: dict[str, Build] = {
    "grouped convolution": partial(peers.at_once, forward=peers.grouped),
    "unfold + bmm": partial(peers.at_once, forward=peers.unfolded),
}
JAX: dict[str, Build] = {
    "JAX jit, vmap": partial(_jax, mapped=True),
    "JAX jit, lax.map": partial(_jax, mapped=False),
}
ACCELERATED: dict[str, Build] = {"fastmeta.accelerate, vmap(grad)": accelerated}
EVERYBODY = LOOPS | VMAP | TRICKS | JAX | COMPILED


def _variants(kind: str, build: Callable) -> dict[str, Build]:
    return {
        f"{kind}, {name}, pool {'after' if last else 'before'} ReLU": partial(build, memory_format=f, pool_last=last)
        for name, f in FORMATS.items()
        for last in (False, True)
    }


SUPERVISED = _variants("supervised", peers.supervised)
PLAIN = _variants("plain PyTorch", peers.prototypical)


@dataclass(frozen=True)
class Row:
    """One workload. `faster`: how many times as fast as the fastest of `counted` ours must be; `at_most`: how many
    times the fastest plain supervised step it may take."""

    title: str
    make: Callable[[Make, bool], Problem]  # (make, small)
    ours: Build
    peers: dict[str, Build]
    faster: float
    at_most: float | None = None
    counted: tuple[str, ...] = ()  # of the peers; all, if none is named
    also: dict[str, Build] = field(default_factory=dict)  # other ways to use this package
    yardsticks: dict[str, Build] = field(default_factory=dict)


def on_gpu(row: Row) -> dict[str, Build]:
    """The same without Python and launches: ours, the loop (or what stands for it), plain training."""
    found: dict[str, Build] = {"fastmeta.capture": partial(captured, build=row.ours)}
    for name, build in (row.peers | row.yardsticks).items():
        if (name.startswith("task loop") and name not in COMPILED) or "before ReLU" in name:
            found[f"{name}, CUDA graph"] = partial(graphed, build=build)
    return found


def _ours(problem: Problem) -> Contender:
    return backward_of(maml(problem), problem.batch)


def _conv4(title: str, faster: float, at_most: float, **sizes) -> Row:
    make = partial(problem.conv4, **sizes)
    return Row(title, make, _ours, EVERYBODY, faster, at_most, yardsticks=SUPERVISED, also=ACCELERATED)


def _resnet12(title: str, first_order: bool) -> Row:
    make = partial(problem.resnet12, first_order=first_order)
    return Row(title, make, _ours, LOOPS, 1.0)


ROWS: dict[str, Row] = {
    "conv4-1shot-k1-t4": _conv4("Conv4-64 28x28x1 1-shot K1 T4", 1.6, 1.0, shots=1, steps=1, tasks=4),
    "conv4-1shot-k1-t16": _conv4("Conv4-64 28x28x1 1-shot K1 T16", 1.6, 1.0, shots=1, steps=1, tasks=16),
    "conv4-1shot-k5-t4": _conv4("Conv4-64 28x28x1 1-shot K5 T4", 2.2, 1.6, shots=1, steps=5, tasks=4),
    "conv4-1shot-k5-t16": _conv4("Conv4-64 28x28x1 1-shot K5 T16", 2.2, 1.6, shots=1, steps=5, tasks=16),
    "conv4-5shot-k5-t4": _conv4("Conv4-64 28x28x1 5-shot K5 T4", 1.8, 2.2, shots=5, steps=5, tasks=4),
    "conv4-84-k5-t4": _conv4(
        "Conv4-32 84x84x3 1-shot K5 T4", 1.8, 1.7, shots=1, steps=5, tasks=4, hidden=32, channels=3, side=84
    ),
    "resnet12-second-order": _resnet12("ResNet-12 84x84x3 1-shot K1 T2, second order", False),
    "resnet12-first-order": _resnet12("ResNet-12 84x84x3 1-shot K1 T2, first order", True),
    "protonet": Row(
        "ProtoNet training step, Conv4-64 28x28x1, 20-way 1-shot 5-query",
        problem.prototypes,
        lambda p: backward_of(ProtoNet(p.model), p.batch),
        PLAIN,
        1.4,
    ),
    "sensors": Row(
        "Conv4-64 of one dimension, windows 3x10, 4-way 5-shot K5 T16",
        problem.sensors,
        _ours,
        {"task loop": LOOPS["task loop, contiguous"]} | VMAP | COMPILED,
        1.6,
        counted=("task loop",),
        also=ACCELERATED,
        yardsticks={"supervised": partial(peers.supervised, memory_format=FORMATS["contiguous"], pool_last=False)},
    ),
}
