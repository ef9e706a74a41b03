"""What can be trained by name: how each algorithm is built from a run's settings, and the settings that it begins with.

A new algorithm is one entry here; the command line, checkpoints and evaluation know it by that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from .. import algorithms
from ..nn import conv4, mlp

if TYPE_CHECKING:
    from ..tasks import TaskSource


class Settings(Protocol):
    """What an entry reads of a run's settings."""

    ways: int
    train_ways: int
    model: str
    hidden: tuple[int, ...]
    norm: str
    metric: str
    inner_lr: float
    inner_steps: int
    first_order: bool
    engine: str
    task_chunk: int | str | None


@dataclass(frozen=True)
class Algorithm:
    """An entry: `build(config, tasks, settings)` returns the module, newly initialised."""

    build: Callable[[Settings, TaskSource, dict[str, Any]], nn.Module]
    summary: str
    kinds: tuple[str, ...] = ("classification",)
    # one output per class: as many classes in training as in validation, and no others afterwards
    fixed_ways: bool = False
    # whether there is something to train where examples are features already (the model "none")
    without_model: bool = False
    # keyword arguments of the class that `--set name=value` reaches, with their defaults
    settings: Mapping[str, Any] = field(default_factory=dict)
    # what differs from the defaults of its group, for images and for sinusoids
    images: Mapping[str, Any] = field(default_factory=dict)
    sinusoid: Mapping[str, Any] = field(default_factory=dict)
    # published settings of metric-based methods (many ways, one task a step) or of inner loops (a task batch)
    group: str = "metric"


def _size(tasks: TaskSource) -> tuple[int, int]:
    shape = tuple(tasks.input_shape)
    return torch.Size(shape).numel(), shape[0]


def encoder(config: Settings, tasks: TaskSource) -> nn.Module:
    """From examples `[B, ...]` to embeddings `[B, D]`."""
    size, channels = _size(tasks)
    if config.model == "none":
        return nn.Flatten()
    if config.model == "conv4":
        return conv4(channels, config.hidden[0])
    return mlp([size, *config.hidden], norm=config.norm)


def features(body: nn.Module, tasks: TaskSource) -> int:
    """D of an encoder."""
    was_training = body.training
    with torch.no_grad():
        width = body.eval()(torch.zeros(2, *tasks.input_shape)).shape[1]
    body.train(was_training)
    return width


def classifier(config: Settings, tasks: TaskSource) -> nn.Module:
    """From examples `[B, ...]` to one output per class, or the target's width."""
    size, channels = _size(tasks)
    if config.model == "conv4":
        # Batch statistics in eval mode too: adaptation never updates running ones.
        shape = {"num_classes": tasks.output_size, "image_size": tuple(tasks.input_shape[-2:])}
        return conv4(channels, config.hidden[0], **shape, track_running_stats=False)
    return mlp([size, *config.hidden, tasks.output_size], norm=config.norm, track_running_stats=False)


def loss_of(tasks: TaskSource) -> str:
    return "mse" if tasks.kind == "regression" else "cross_entropy"


def _maml(config, tasks, settings):
    return algorithms.MAML(
        classifier(config, tasks), inner_lr=config.inner_lr, inner_steps=config.inner_steps,
        first_order=config.first_order, loss=loss_of(tasks), engine=config.engine, task_chunk=config.task_chunk,
        **settings,
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


def _protonet(config, tasks, settings):
    return algorithms.ProtoNet(encoder(config, tasks), metric=config.metric, ways=config.train_ways)


def _loop_options(config, tasks) -> dict[str, Any]:
    return {"inner_lr": config.inner_lr, "inner_steps": config.inner_steps, "loss": loss_of(tasks)}


def _reptile(config, tasks, settings):
    return algorithms.Reptile(classifier(config, tasks), **_loop_options(config, tasks), **settings)


def _imaml(config, tasks, settings):
    # the inner problem is not convex: conjugate gradients need few steps, and damping
    settings = {"cg_steps": 2, "cg_damping": 10.0, **settings}
    return algorithms.ImplicitMAML(classifier(config, tasks), **_loop_options(config, tasks), **settings)


class _ContextMLP(nn.Module):
    """A perceptron on flattened examples `[B, ...]` beside the task's context `[P]`."""

    def __init__(self, sizes: list[int], **options: Any):
        super().__init__()
        self.mlp = mlp(sizes, **options)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.mlp(torch.cat([x.flatten(1), context.expand(len(x), -1)], 1))


def _cavia(config, tasks, settings):
    size, channels = _size(tasks)
    images = tasks.kind == "classification"
    context = settings.pop("context_size", None) or (100 if images else 5)
    if config.model == "conv4":
        side = tasks.input_shape[-1]
        options = {"in_channels": channels, "hidden": config.hidden[0], "image_size": side}
        model = algorithms.ContextFiLMConv4(tasks.output_size, context, **options)
    else:
        sizes = [size + context, *config.hidden, tasks.output_size]
        norm = {"norm": config.norm, "track_running_stats": False}
        model = _ContextMLP(sizes, **norm) if images else mlp(sizes, **norm)
    return algorithms.CAVIA(
        model, context, concatenate=not images, first_order=config.first_order, task_chunk=config.task_chunk,
        **_loop_options(config, tasks), **settings,
    )  # fmt: skip


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


def _gradient_head(config, tasks, settings):
    return algorithms.GradientHead(
        encoder(config, tasks), inner_lr=config.inner_lr, inner_steps=config.inner_steps,
        first_order=config.first_order, ways=config.train_ways, **settings,
    )  # fmt: skip


def _hypernetwork(config, tasks, settings):
    if tasks.kind == "regression":
        size, _ = _size(tasks)
        settings = {"mode": "full", "hidden": config.hidden, **settings}
        return algorithms.Hypernetwork(nn.Flatten(), size, outputs=tasks.output_size, **settings)
    body = encoder(config, tasks)
    return algorithms.Hypernetwork(body, features(body, tasks), ways=config.train_ways, **settings)


def _modulated_protonet(config, tasks, settings):
    body = encoder(config, tasks)
    width, (size, channels) = features(body, tasks), _size(tasks)
    if config.model == "conv4":
        base = algorithms.FiLMConv4(2 * width, channels, config.hidden[0])
    else:
        base = algorithms.FiLMMLP(2 * width, [size, *config.hidden])
    return algorithms.ModulatedProtoNet(body, base, ways=config.train_ways, **settings)


def _caml_conditional(config, tasks, settings):
    body = encoder(config, tasks)
    width, (size, channels) = features(body, tasks), _size(tasks)
    if config.model == "conv4":
        options = {"outputs": tasks.output_size, "image_size": tasks.input_shape[-1], "track_running_stats": False}
        base = algorithms.FiLMConv4(width, channels, config.hidden[0], **options)
    else:
        base = algorithms.FiLMMLP(width, [size, *config.hidden, tasks.output_size])
    settings = {"metric_weight": 0.5, **settings}  # nothing has trained the metric space before
    return algorithms.ConditionalCAML(
        body, base, first_order=config.first_order, task_chunk=config.task_chunk, **_loop_options(config, tasks),
        **settings,
    )  # fmt: skip


def _caml_incontext(config, tasks, settings):
    body = encoder(config, tasks)
    settings = {"max_ways": max(config.ways, config.train_ways), **settings}
    return algorithms.InContextCAML(body, features(body, tasks), ways=config.train_ways, **settings)


def _contrastive(config, tasks, settings):
    body = encoder(config, tasks)
    width, projected = features(body, tasks), settings.pop("projection", 64)
    projection = mlp([width, projected, projected]) if projected else None
    settings = {"temperature": 0.1, "features": "projection", **settings}  # better than the class's own, on Omniglot
    return algorithms.Contrastive(body, projection, ways=config.ways, **settings)


_BOTH = ("classification", "regression")
# found on Omniglot, for a few minutes on one core
_SOME_WAYS = {"train_ways": 20, "train_query_shots": 3, "task_batch": 2, "outer_lr": 2e-3}
_FEW_WAYS = {"train_ways": 5, "train_query_shots": 2, "task_batch": 8, "outer_lr": 2e-3}

ALGORITHMS: dict[str, Algorithm] = {
    "maml": Algorithm(
        _maml, "MAML, first or second order", _BOTH, fixed_ways=True, group="inner",
        without_model=True, settings={"learn_inner_lr": False, "inner_optimizer": "sgd"},
    ),
    "metasgd": Algorithm(
        _inner_loop("MetaSGD", rate=False), "Meta-SGD: a learned rate per weight", _BOTH, fixed_ways=True,
        group="inner", without_model=True,
    ),
    "anil": Algorithm(
        _inner_loop("ANIL"), "ANIL: the head alone adapts", _BOTH, fixed_ways=True, group="inner",
        images={"inner_lr": 0.1, "inner_steps": 5, "eval_inner_steps": 5},
    ),
    "boil": Algorithm(
        _inner_loop("BOIL"), "BOIL: the body alone adapts", _BOTH, fixed_ways=True, group="inner",
        images={"inner_lr": 0.5, "inner_steps": 1, "eval_inner_steps": 1},
    ),
    "maml++": Algorithm(
        _inner_loop("MAMLPlusPlus"), "MAML++: rates per layer and step, loss after every step", _BOTH, fixed_ways=True,
        group="inner", without_model=True, images={"inner_lr": 0.1, "inner_steps": 5, "eval_inner_steps": 5},
        settings={
            "learned_rates": True, "multi_step_iterations": 5000, "first_order_iterations": 0, "adapt_norms": False,
        },
    ),
    "cavia": Algorithm(
        _cavia, "CAVIA: context parameters adapt, the weights are shared", _BOTH, fixed_ways=True, group="inner",
        sinusoid={"inner_lr": 1.0}, images={"inner_lr": 1.0, "inner_steps": 2, "eval_inner_steps": 2},
        settings={"context_size": 5},
    ),
    "reptile": Algorithm(
        _reptile, "Reptile: towards the mean of the adapted weights", _BOTH, fixed_ways=True, group="inner",
        without_model=True,
        sinusoid={"inner_lr": 0.01, "inner_steps": 10, "eval_inner_steps": 10},
        images={"inner_lr": 1e-3, "inner_steps": 5, "eval_inner_steps": 50},
        settings={"optimizer": "adam", "batch_size": 10, "train_on": "all", "serial": False, "serial_rate": 0.1},
    ),
    "imaml": Algorithm(
        _imaml, "implicit MAML: conjugate gradients in place of a graph", _BOTH, fixed_ways=True, group="inner",
        without_model=True,
        sinusoid={"inner_lr": 0.01, "inner_steps": 16, "eval_inner_steps": 16},
        images={"inner_lr": 0.1, "inner_steps": 16, "eval_inner_steps": 16},
        settings={"regularization": 2.0, "cg_steps": 2, "cg_damping": 10.0},
    ),
    "protonet": Algorithm(_protonet, "Prototypical Networks"),
    "matching": Algorithm(
        _matching, "Matching Networks",
        settings={"scale": 10.0, "learn_scale": True, "full_context": False, "steps": 5},
        images=_SOME_WAYS, without_model=True,
    ),
    "relation": Algorithm(
        _relation, "Relation Networks", settings={"pool": "sum", "loss": "mse"}, without_model=True
    ),
    "ridge": Algorithm(
        _ridge, "ridge regression as the head, solved for every task", _BOTH, settings={"ridge": 1.0},
        without_model=True,
    ),
    "gradient-head": Algorithm(
        _gradient_head, "ANIL from a head of zeros: any number of classes", settings={"normalise": True},
        images={**_SOME_WAYS, "inner_lr": 10.0, "inner_steps": 1, "eval_inner_steps": 1},
    ),
    "hypernetwork": Algorithm(
        _hypernetwork, "weights generated from the support set", _BOTH,
        settings={"mode": "head", "set_width": 128, "rank": 4}, images=_SOME_WAYS, without_model=True,
    ),
    "modulated-protonet": Algorithm(
        _modulated_protonet, "Prototypical Networks on features modulated by the task's classes",
        settings={"metric_weight": 0.5}, images=_SOME_WAYS,
    ),
    "caml-conditional": Algorithm(
        _caml_conditional, "CAML of 2019: an inner loop on features modulated by a metric space", fixed_ways=True,
        group="inner", settings={"metric_weight": 0.5},
    ),
    "caml-incontext": Algorithm(
        _caml_incontext, "CAML of 2024: in-context learning by a transformer",
        settings={"code_width": 64, "layers": 2, "heads": 8, "feedforward": 256, "query_in_context": True},
        images=_FEW_WAYS,
        without_model=True,
    ),
    "contrastive": Algorithm(
        _contrastive, "SimCLR: two views of images without labels, a linear head on the frozen encoder",
        settings={
            "projection": 64, "temperature": 0.1, "features": "projection", "head": "mean", "centre": "none",
            "ridge": 0.1, "fine_tune_steps": 0, "fine_tune_lr": 0.1,
        },
        images={
            "labels": "augment", "augment_support": True, "train_ways": 128, "train_shots": 1, "train_query_shots": 1,
            "outer_lr": 2e-3,
        },
    ),
}  # fmt: skip
