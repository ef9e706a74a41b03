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


ALGORITHMS: dict[str, Algorithm] = {
    "maml": Algorithm(
        _maml, "MAML, first or second order", ("classification", "regression"), fixed_ways=True, group="inner"
    ),
    "protonet": Algorithm(_protonet, "Prototypical Networks"),
}
