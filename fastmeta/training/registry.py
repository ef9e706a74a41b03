"""What can be trained by name: how each algorithm is built from a run's settings, and the settings that it begins with.

A new algorithm is one entry here; the command line, checkpoints and evaluation know it by that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import algorithms
from ..nn import conv4, mlp

if TYPE_CHECKING:
    from .config import RunConfig
    from .loop import TaskSource


@dataclass(frozen=True)
class Algorithm:
    """An entry: `build(config, tasks, settings)` returns the module, newly initialised."""

    build: Callable[[RunConfig, TaskSource, dict[str, Any]], nn.Module]
    summary: str
    kinds: tuple[str, ...] = ("classification",)
    # one output per class: as many classes in training as in validation, and no others afterwards
    fixed_ways: bool = False
    # keyword arguments of the class that `--set name=value` reaches, with their defaults
    settings: Mapping[str, Any] = field(default_factory=dict)
    # what differs from the defaults of its group (`config.py`), for images and for sinusoids
    images: Mapping[str, Any] = field(default_factory=dict)
    sinusoid: Mapping[str, Any] = field(default_factory=dict)
    # published settings of metric-based methods (many ways, one task a step) or of inner loops (a task batch)
    group: str = "metric"


def _size(tasks: TaskSource) -> tuple[int, int]:
    shape = tuple(tasks.input_shape)
    return torch.Size(shape).numel(), shape[0]


def encoder(config: RunConfig, tasks: TaskSource) -> nn.Module:
    """From examples `[B, ...]` to embeddings `[B, D]`."""
    size, channels = _size(tasks)
    return conv4(channels, config.hidden[0]) if config.model == "conv4" else mlp([size, *config.hidden])


def features(body: nn.Module, tasks: TaskSource) -> int:
    """D of an encoder."""
    was_training = body.training
    with torch.no_grad():
        width = body.eval()(torch.zeros(2, *tasks.input_shape)).shape[1]
    body.train(was_training)
    return width


def classifier(config: RunConfig, tasks: TaskSource) -> nn.Module:
    """From examples `[B, ...]` to one output per class, or the target's width."""
    size, channels = _size(tasks)
    if config.model == "conv4":
        # Batch statistics in eval mode too: adaptation never updates running ones.
        body = conv4(channels, config.hidden[0], track_running_stats=False)
        return nn.Sequential(*body, nn.Linear(features(body, tasks), tasks.output_size))
    return mlp([size, *config.hidden, tasks.output_size])


def loss_of(tasks: TaskSource) -> str:
    return "mse" if tasks.kind == "regression" else "cross_entropy"


def _maml(config, tasks, settings):
    return algorithms.MAML(
        classifier(config, tasks), inner_lr=config.inner_lr, inner_steps=config.inner_steps,
        first_order=config.first_order, loss=loss_of(tasks), engine=config.engine, task_chunk=config.task_chunk,
    )  # fmt: skip


def _inner_loop(name: str, *, rate: bool = True, order: bool = True):
    """A class that takes a model, inner steps and loss; `rate`, `order`: and an inner rate, and first_order."""

    def build(config, tasks, settings):
        options = {"inner_steps": config.inner_steps, "loss": loss_of(tasks), "task_chunk": config.task_chunk}
        if rate:
            options["inner_lr"] = config.inner_lr
        if order:
            options["first_order"] = config.first_order
        return getattr(algorithms, name)(classifier(config, tasks), **options, **settings)

    return build


def _metric(name: str):
    """A class that takes an encoder."""

    def build(config, tasks, settings):
        return getattr(algorithms, name)(encoder(config, tasks), ways=config.train_ways, **settings)

    return build


def _protonet(config, tasks, settings):
    return algorithms.ProtoNet(encoder(config, tasks), metric=config.metric, ways=config.train_ways)


def _matching(config, tasks, settings):
    body = encoder(config, tasks)
    width = features(body, tasks) if settings.get("full_context") else None
    return algorithms.MatchingNetwork(body, features=width, ways=config.train_ways, **settings)


def _relation(config, tasks, settings):
    _, channels = _size(tasks)
    if config.model == "conv4":
        body = algorithms.relation_encoder(channels, config.hidden[0])
        with torch.no_grad():
            maps = body.eval()(torch.zeros(2, *tasks.input_shape))
        body.train()
        relation = algorithms.RelationConv(maps.shape[1], size=maps.shape[-1])
    else:
        body = encoder(config, tasks)
        relation = algorithms.RelationMLP(features(body, tasks))
    return algorithms.RelationNetwork(body, relation, ways=config.train_ways, **settings)


def _ridge(config, tasks, settings):
    return algorithms.RidgeHead(encoder(config, tasks), loss=loss_of(tasks), ways=config.train_ways, **settings)


def _hypernetwork(config, tasks, settings):
    if tasks.kind == "regression":
        size, _ = _size(tasks)
        settings = {"mode": "full", "hidden": config.hidden, **settings}
        return algorithms.Hypernetwork(nn.Flatten(), size, outputs=tasks.output_size, **settings)
    body = encoder(config, tasks)
    return algorithms.Hypernetwork(body, features(body, tasks), ways=config.train_ways, **settings)


def _caml_modulation(config, tasks, settings):
    body = encoder(config, tasks)
    width, (size, channels) = features(body, tasks), _size(tasks)
    if config.model == "conv4":
        base = algorithms.FiLMConv4(2 * width, channels, config.hidden[0])
    else:
        base = algorithms.FiLMMLP(2 * width, [size, *config.hidden])
    return algorithms.ModulationCAML(body, base, ways=config.train_ways, **settings)


def _caml_incontext(config, tasks, settings):
    body = encoder(config, tasks)
    settings = {"max_ways": max(config.ways, config.train_ways), **settings}
    return algorithms.InContextCAML(body, features(body, tasks), ways=config.train_ways, **settings)


_BOTH = ("classification", "regression")
_FEW_WAYS = {"train_ways": 5, "task_batch": 32}  # as many classes as in the test, many tasks a step

ALGORITHMS: dict[str, Algorithm] = {
    "maml": Algorithm(_maml, "MAML, first or second order", _BOTH, fixed_ways=True, group="inner"),
    "metasgd": Algorithm(
        _inner_loop("MetaSGD", rate=False), "Meta-SGD: a learned rate per weight", _BOTH, fixed_ways=True, group="inner"
    ),
    "anil": Algorithm(
        _inner_loop("ANIL"), "ANIL: the head alone adapts", _BOTH, fixed_ways=True, group="inner",
        images={"inner_lr": 0.1, "inner_steps": 5, "eval_inner_steps": 5},
    ),
    "boil": Algorithm(
        _inner_loop("BOIL"), "BOIL: the body alone adapts", _BOTH, fixed_ways=True, group="inner",
        images={"inner_lr": 0.5, "inner_steps": 1, "eval_inner_steps": 1},
    ),
    "protonet": Algorithm(_protonet, "Prototypical Networks"),
    "matching": Algorithm(
        _matching, "Matching Networks",
        settings={"scale": 10.0, "learn_scale": True, "full_context": False, "steps": 5},
    ),
    "relation": Algorithm(_relation, "Relation Networks", settings={"pool": "sum", "loss": "mse"}),
    "ridge": Algorithm(_ridge, "ridge regression as the head, solved for every task", _BOTH, settings={"ridge": 1.0}),
    "hypernetwork": Algorithm(
        _hypernetwork, "weights generated from the support set", _BOTH,
        settings={"mode": "head", "set_width": 128, "rank": 4}, images=_FEW_WAYS,
    ),
    "caml-modulation": Algorithm(
        _caml_modulation, "CAML of 2019: features modulated by the task's classes", settings={"metric_weight": 0.5},
    ),
    "caml-incontext": Algorithm(
        _caml_incontext, "CAML of 2024: in-context learning by a transformer",
        settings={"code_width": 64, "layers": 2, "heads": 8, "feedforward": 256}, images=_FEW_WAYS,
    ),
}  # fmt: skip
