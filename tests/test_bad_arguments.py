"""Wrong calls of everything public: one argument at a time of a call that is right is replaced by what it cannot be.

Each must raise a TypeError or ValueError of fastmeta's own that names the argument, or, where the value may be meant,
do what it says. Nothing may come from deeper: an attribute that a list does not have, a kernel that is missing for a
layout, a number that torch refuses.
"""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from wrong_values import (
    NO_TENSORS,
    Argument,
    N,
    choice,
    count,
    device,
    flag,
    floats,
    function,
    generator,
    images,
    labels,
    layers,
    mask,
    may,
    module,
    number,
    one_of,
    optional,
    pair,
    partitions,
    path,
    rates,
    seed,
    sizes,
    unread,
    widened,
)  # fmt: skip

import fastmeta
from fastmeta import algorithms, functional, irl, tasks, training
from fastmeta.algorithms._embedding import EmbeddingLearner
from fastmeta.nn import conv4, mlp
from fastmeta.tasks import TaskBatch

T, S, Q, D = 2, 6, 4, 5
MODULES = ("encoder", "model")  # whose fault it may be as well that the two do not fit together
HOME = str(Path(fastmeta.__file__).parent)


class Case(NamedTuple):
    call: Callable
    arguments: dict[str, Argument]
    constants: dict[str, Any] = {}


def squares(params):
    return params["w"].square().sum()


METRIC = choice("sqeuclidean", "euclidean", "cosine", "dot", "manhattan")
CASES: dict[str, Case] = {}


def case(label: str, call: Callable, constants: dict[str, Any] | None = None, **arguments: Argument) -> None:
    CASES[label] = Case(call, arguments, constants or {})


def problem_of(case: Case, name: str, label: str, value: Any, may_be_served: bool) -> str | None:
    """What is wrong with how the call answers, or None."""
    given = case.constants | {key: argument.make() for key, argument in case.arguments.items()} | {name: value}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.call(**given)
    except (TypeError, ValueError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        names = [name, *case.arguments, *MODULES] if may_be_served else [name]
        if type(error) not in (TypeError, ValueError, training.CheckpointError):
            return f"{name} = {label}: {type(error).__name__}"
        if not where.filename.startswith(HOME):
            return f"{name} = {label}: an inner message, {error!r:.120}"
        if not any(re.search(rf"\b{key}\b", str(error)) for key in names):
            return f"{name} = {label}: does not name it, {error!r:.120}"
        return None
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}, {str(error)[:90]!r}"
        return f"{name} = {label}: {text} from {where.filename[-30:]}:{where.lineno}"
    return None if may_be_served else f"{name} = {label}: accepted"


# ---------------------------------------------------------------------------------------------------- functional
case("class_prototypes", functional.class_prototypes, embeddings=floats(T, S, D, alone=True), labels=labels(T, S),
     num_classes=count(N, 0))  # fmt: skip
case("pairwise_distance", functional.pairwise_distance, query=floats(T, Q, D), prototypes=floats(T, N, D),
     metric=METRIC)  # fmt: skip
case("prototypical_loss", functional.prototypical_loss, support=floats(T, S, D), support_labels=labels(T, S),
     query=floats(T, Q, D), query_labels=labels(T, Q), num_classes=count(N, 0), metric=METRIC,
     weights=floats(T, or_none=True))  # fmt: skip
case("contrastive_loss", functional.contrastive_loss, first=floats(T, S, D), second=floats(T, S, D),
     temperature=number(0.5, 0, open=True), normalise=flag(True), weights=floats(T, or_none=True))  # fmt: skip
case("functional_mlp", functional.functional_mlp, x=floats(T, S, D), weights=layers((4, D), (N, 4)),
     biases=layers((4,), (N,), or_none=True), activation=choice("relu", "tanh", "sine", "gelu"))  # fmt: skip
STRIDES = {"stride": may(count(1), {"list"}), "dilation": may(count(1), {"list"}), "groups": count(1)}
case("task_conv2d", functional.task_conv2d, x=floats(T, S, D, 4, 4), weight=floats(T, N, D, 3, 3),
     bias=floats(T, N, or_none=True), padding=may(count(1, 0), {"list"}), **STRIDES)  # fmt: skip
case("task_conv1d", functional.task_conv1d, x=floats(T, S, D, 4), weight=floats(T, N, D, 3),
     bias=floats(T, N, or_none=True), padding=choice("same", "valid", tensor=True), **STRIDES)  # fmt: skip
case("norm_act_pool", functional.norm_act_pool, x=floats(T, S, D, 4, 4), weight=floats(T, D, or_none=True),
     bias=floats(T, D, or_none=True), norm=choice("batch", "instance", "group", "layer", "none"), eps=number(0.1, 0),
     activation=choice("relu", "leaky_relu", "gelu", "silu", "identity"), slope=number(0.1, 0),
     pool=choice("none", "max", "average"), return_moments=flag())  # fmt: skip
case("norm_act_pool, group", functional.norm_act_pool, {"norm": "group"}, x=floats(T, S, D, 4, alone=True),
     groups=count(5))  # fmt: skip
MLP = {"weights": layers((4, D), (N, 4)), "biases": layers((4,), (N,), or_none=True)}
LOOP = {
    "lr": number(0.1, 0), "steps": count(2, 0), "activation": choice("relu", "tanh"), "first_order": flag(),
    "momentum": number(0.0, 0), "weight_decay": number(0.0, 0), "support_mask": mask(T, S),
    "huber_delta": number(1.0, 0, open=True), "form": choice("auto", "lowrank", "onchip"),
}  # fmt: skip
case("adapt_mlp", functional.adapt_mlp, support_x=floats(T, S, D), support_y=labels(T, S), **MLP, **LOOP,
     loss=choice("cross_entropy"), norm=choice("layer", or_none=True))  # fmt: skip
case("meta_loss_mlp", functional.meta_loss_mlp, support_x=floats(T, S, D), support_y=labels(T, S),
     query_x=floats(T, Q, D), query_y=labels(T, Q), **MLP, **LOOP, loss=choice("cross_entropy"),
     query_mask=mask(T, Q), task_weights=floats(T, or_none=True))  # fmt: skip
case("adapt_mlp of values", functional.adapt_mlp, {"steps": 1, "loss": "huber", "lr": 0.1}, support_x=floats(T, S, D),
     support_y=floats(T, S, N), **MLP)  # fmt: skip
case("adapt_mlp with rates", functional.adapt_mlp, {"steps": 2, "biases": None}, support_x=floats(T, S, D),
     support_y=labels(T, S), weights=layers((4, D), (N, 4)), lr=rates(floats(2, 2)))  # fmt: skip
case("adapt_mlp, fast weights", lambda x, **given: functional.functional_mlp(
     x, functional.adapt_mlp(torch.rand(T, S, D), torch.zeros(T, S).long(), [torch.rand(4, D), torch.rand(N, 4)], None,
                             lr=0.1, steps=1, form="lowrank")), x=floats(T, Q, D))  # fmt: skip
case("fast_weight_update", functional.fast_weight_update, params=layers((4, D), (4,)), grads=layers((T, 4, D), (T, 4)),
     lr=number(0.1))  # fmt: skip
case("fast_weight_update of one", functional.fast_weight_update, params=floats(4, D), grads=floats(T, 4, D),
     lr=rates(floats(4, D)))  # fmt: skip
case("fast_weight_update with rates", functional.fast_weight_update, params=layers((4, D), (4,)),
     grads=layers((T, 4, D), (T, 4)), lr=rates(layers((4, D), (4,))))  # fmt: skip
case("sgd_step", functional.sgd_step, params=layers((T, 4, D), (T, 4)), grads=layers((T, 4, D), (T, 4)),
     lr=number(0.1), momentum=number(0.1, 0), dampening=number(0.1), weight_decay=number(0.1, 0))  # fmt: skip
case("adam_step", functional.adam_step, params=layers((T, 4, D), (T, 4)), grads=layers((T, 4, D), (T, 4)),
     lr=number(0.1), eps=number(0.1, 0), weight_decay=number(0.1, 0), decoupled=flag(), amsgrad=flag())  # fmt: skip
case("meta_gradient", functional.meta_gradient, {"params": {"w": torch.ones(2, 3, requires_grad=True)}},
     inner_loss=function(lambda: squares, False), outer_loss=function(lambda: squares, False), lr=number(0.1),
     steps=count(2, 0), momentum=number(0.1, 0), weight_decay=number(0.1, 0), first_order=flag(), every=count(1),
     has_aux=flag(), preserve_rng_state=flag(True))  # fmt: skip
case("use_backend", lambda name: fastmeta.use_backend(name).__enter__(), name=choice("reference"))
case("check_labels", lambda enabled: fastmeta.check_labels(enabled), enabled=flag(True))

# ------------------------------------------------------------------------------------------------------- tasks, nn
SIZES = {"ways": count(2), "shots": count(1), "query_shots": count(2)}


def sampled(make):
    return lambda num_tasks, generator: make().sample(num_tasks, generator=generator)


case("make_tasks", tasks.make_tasks, name=choice("sinusoid"), split=choice("train", "test"),
     ways=count(5, or_none=True), shots=count(3, or_none=True), query_shots=count(3, or_none=True), device=device(),
     seed=seed(), partition=choice("vinyals"))  # fmt: skip
case("load_images", tasks.load_images, {"split": "val"}, name=choice("glyphs"), seed=seed(),
     partition=choice("vinyals"))  # fmt: skip
case("glyphs", tasks.glyphs, split=choice("val"), seed=seed())
case("SinusoidTasks", tasks.SinusoidTasks, shots=count(3), query_shots=count(3), device=device())
case("SinusoidTasks.sample", sampled(tasks.SinusoidTasks), num_tasks=count(2, 0), generator=generator())
case("EpisodeSampler", tasks.EpisodeSampler, images=may(images(6, 4, 1, 8, 8), {"int64"}), **SIZES, rotations=flag(),
     replace=flag(), classes=choice("even", "size"), augment=function(tasks.Augmentation),
     device=optional(device()))  # fmt: skip
case("EpisodeSampler of all", tasks.EpisodeSampler, {"images": torch.rand(6, 4, 2), "ways": 2, "shots": 1},
     query_shots=choice("all"), most_queries=count(2, or_none=True))  # fmt: skip
case("EpisodeSampler of ranges", tasks.EpisodeSampler, {"images": torch.rand(6, 4, 2), "query_shots": 1},
     ways=may(sizes(2, 3), {"int"}), shots=may(sizes(1, 2), {"int"}))  # fmt: skip
case("EpisodeSampler.sample", sampled(lambda: tasks.EpisodeSampler(torch.rand(6, 4, 1, 8, 8), ways=2, shots=1,
     query_shots=2)), num_tasks=count(2, 0), generator=generator())  # fmt: skip
case("AugmentedTasks", tasks.AugmentedTasks, images=images(6, 4, 1, 8, 8), **SIZES,
     augmentation=function(tasks.Augmentation, False), augment_support=flag(), rotations=flag())  # fmt: skip
case("AugmentedTasks.sample", sampled(lambda: tasks.AugmentedTasks(torch.rand(6, 1, 8, 8), ways=2)),
     num_tasks=count(2, 0), generator=generator())  # fmt: skip
case("ClusterTasks", tasks.ClusterTasks, images=images(6, 4, 1, 8, 8), partitions=partitions(), **SIZES,
     rotations=flag())  # fmt: skip
case("ClusterTasks.sample", sampled(lambda: tasks.ClusterTasks(torch.rand(6, 4, 1, 8, 8), torch.arange(24).fmod(4),
     ways=2)), num_tasks=count(2, 0), generator=generator())  # fmt: skip
case("Examples", tasks.Examples, rows=may(floats(6, 3, alone=True, any_type=True), {"complex"}),
     labels=may(labels(6), {"int32", "negative", "too large", "bool"}))  # fmt: skip
case("MixedTasks", tasks.MixedTasks, sources=one_of(lambda: {tasks.SinusoidTasks(): 1}))
case("MixedTasks, weights", lambda weight: tasks.MixedTasks({tasks.SinusoidTasks(): weight}), weight=number(1.0, 0,
     open=True))  # fmt: skip
case("Prefetched", tasks.Prefetched, tasks=one_of(tasks.SinusoidTasks))
case("Prefetched.sample", sampled(lambda: tasks.Prefetched(tasks.SinusoidTasks())), num_tasks=count(2, 0),
     generator=generator())  # fmt: skip
case("kmeans_partitions", tasks.kmeans_partitions, embeddings=floats(12, 3, alone=True, any_type=True),
     clusters=count(2), partitions=count(1), seed=seed())  # fmt: skip
case("embed_images", tasks.embed_images, encoder=module(nn.Flatten), images=images(6, 4, 1, 8, 8))
case("Augmentation", tasks.Augmentation, rotate=number(5.0, 0), scale=number(0.1, 0), shift=number(0.1, 0),
     crop=number(0.1, 0, below=1.0), thicken=number(0.1, 0, below=1.5), drop=number(0.1, 0, below=1.0),
     flip=number(0.1, 0, below=1.5), brightness=number(0.1, 0), contrast=number(0.1, 0),
     saturation=number(0.1, 0))  # fmt: skip
case("Augmentation()", tasks.Augmentation(rotate=5.0, drop=0.1, thicken=0.1),
     images=images(3, 1, 8, 8), generator=generator())  # fmt: skip
case("mlp", mlp, sizes=sizes(5, 4, 3), activation=choice("relu", "gelu"), bias=flag(True), norm=choice("batch", "none"),
     track_running_stats=flag(True))  # fmt: skip
case("conv4", conv4, in_channels=count(1), hidden=count(4), track_running_stats=flag(True))

# -------------------------------------------------------------------------------------------------------------- irl
WORLD = {"samples": count(3), "demonstrations": count(2), "horizon": count(3), "strength": number(1.0)}
WORLD["device"] = device()
case("GridworldTasks", irl.GridworldTasks, size=count(3, 2), colours=count(3, 3), code=count(4),
     distractors=count(2, 0), seed=seed(), **WORLD)  # fmt: skip
case("PointMassTasks", irl.PointMassTasks, width=number(0.4, 0, open=True),
     velocity=number(0.1, 0, open=True), noise=number(0.1, 0, open=True), candidates=count(4), starts=count(2),
     **WORLD)  # fmt: skip
for world in (irl.GridworldTasks, irl.PointMassTasks):
    name, made = world.__name__, world(horizon=3, demonstrations=2, samples=2)
    worlds, states = made.worlds(2), made.states(made.worlds(2))
    hidden = {"worlds": one_of(lambda worlds=worlds: worlds)}
    shown = {} if world is irl.GridworldTasks else {"states": one_of(lambda states=states: states)}
    case(f"{name}.sample", made.sample, num_tasks=count(2, 0), generator=generator())
    case(f"{name}.worlds", made.worlds, num_tasks=count(2, 0), generator=generator())
    case(f"{name}.demonstrate", made.demonstrate, **hidden, demonstrations=count(2), generator=generator())
    case(f"{name}.value_difference", made.value_difference, **hidden, **shown,
         rewards=floats(2, states.shape[1], 1, alone=True))  # fmt: skip
case("MaxEntLoss", irl.MaxEntLoss, samples=count(2), horizon=count(3))
case("MaxEntLoss()", irl.MaxEntLoss(2, 3), rewards=floats(18, 1, alone=True), targets=floats(18, 1, alone=True))
case("TabularMaxEntLoss", irl.TabularMaxEntLoss, samples=count(2))
case("TabularMaxEntLoss()", irl.TabularMaxEntLoss(2), rewards=floats(5, 1, alone=True),
     targets=floats(5, 6, alone=True))  # fmt: skip


# --------------------------------------------------------------------------------------------------------- training
class OneLayer(nn.Module):
    """The least that trains."""

    inner_steps = 1

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, batch):
        return algorithms.output.over_tasks((self.layer(batch.query_x) - batch.query_y).square().mean((1, 2)))


def loaded(path):
    try:
        training.load_checkpoint(path)
    except training.CheckpointError:
        assert path == "nowhere"


case("Trainer", training.Trainer, algorithm=module(OneLayer), tasks=one_of(tasks.SinusoidTasks), task_batch=count(4),
     outer_lr=number(0.1, 0), lr_schedule=choice("constant", "halve", "cosine"), lr_halve_every=count(0, 0),
     iterations=count(2, 0, or_none=True),
     minutes=number(1.0, 0, or_none=True), validate=function(lambda: None),
     eval_every=count(1, 0), save_every=count(1, 0), checkpoints=function(lambda: None),
     record=function(lambda: None), seed=seed(), wrap=function(lambda: None),
     reporters=function(tuple, False))  # fmt: skip
case("evaluate", training.evaluate, algorithm=module(OneLayer), tasks=one_of(tasks.SinusoidTasks), episodes=count(2),
     inner_steps=count(1, 0, or_none=True), by_step=flag(), seed=seed(), stop=function(lambda: None))  # fmt: skip
case("Estimate.of", training.Estimate.of, values=floats(4, alone=True))
case("CheckpointFolder", training.CheckpointFolder, folder=path(), keep=count(2))
case("load_checkpoint", loaded, path=path())
COUNTS = ("shots", "query_shots", "train_shots", "train_query_shots", "task_batch", "eval_tasks", "clusters")
SETTINGS = {
    "model": choice("mlp"), "norm": choice("batch"), "metric": METRIC, "hidden": sizes(4, 4), "ways": count(5),
    **{name: count(2) for name in COUNTS}, "task_chunk": count(1), "threads": count(1), "iterations": count(2),
    **{name: count(1, 0) for name in ("inner_steps", "eval_inner_steps", "eval_every", "save_every")},
    **{name: number(0.1, 0, open=True) for name in ("inner_lr", "outer_lr", "minutes")}, "first_order": flag(),
    "seed": seed(), "device": choice("cpu", "CPU", "meta"), "partition": choice("vinyals", "1200"),
    "labels": choice("true", "cluster"), "lr_schedule": choice("constant"), "engine": choice("auto"),
}  # fmt: skip
SETTINGS = {name: optional(setting) for name, setting in SETTINGS.items()}
case("run_config", training.run_config, algorithm=choice("maml", "protonet"), data=choice("glyphs", "omniglot"),
     **SETTINGS)  # fmt: skip


# -------------------------------------------------------------------------------------------------------- algorithms
def net(outputs: int = N) -> nn.Module:
    return nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, outputs))


def convolutions(outputs: int = N) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, outputs))


WAYS = {"ways": count(N, or_none=True)}
LOSS = Argument(lambda: "cross_entropy", choice("cross_entropy").wrong, {"function": nn.functional.cross_entropy})
INNER = {"inner_steps": count(2, 0), "loss": LOSS}
TASK_CHUNK = {"first_order": flag(), "task_chunk": count(1, or_none=True)}
RATE = {"inner_lr": number(0.1, 0)}
RULE = {
    "momentum": number(0.0, 0), "weight_decay": number(0.0, 0), "clip_norm": number(1.0, 0, open=True, or_none=True),
    "clip_value": number(1.0, 0, open=True, or_none=True),
}  # fmt: skip
RULED = RULE | RATE | {"learn_inner_lr": flag()}
# by name: how it is made, the module, and its other arguments
LEARNERS = {
    "MAML": (net, INNER | TASK_CHUNK | RULED | {
        "inner_optimizer": choice("sgd", "adam", "adamw"),
        "engine": choice("auto", "fused", "lowrank", "layerwise", "vmap", "loop")}),
    "ANIL": (net, INNER | TASK_CHUNK | RULED | {"adapts": choice("head", "body")}),
    "BOIL": (net, INNER | TASK_CHUNK | RULED),
    "MetaSGD": (net, INNER | TASK_CHUNK | RULE | {"initial_rates": pair()}),
    "MAMLPlusPlus": (net, INNER | TASK_CHUNK | {
        "inner_lr": number(0.1, 0, open=True), "inner_steps": count(2), "learned_rates": flag(True),
        "multi_step_iterations": count(2, 0), "first_order_iterations": count(2, 0),
        "batch_norm_per_step": flag(True), "adapt_norms": flag()}),
    # the context joins the examples, which takes the wider of their dtypes
    "CAVIA": (lambda: nn.Linear(D + 2, N), INNER | TASK_CHUNK | RATE | {
        "context_size": count(2), "concatenate": flag(True)}),
    "ImplicitMAML": (net, INNER | RATE | {"regularization": number(1.0, 0, open=True), "cg_steps": count(2),
                                          "cg_damping": number(0.0, 0)}),
    "Reptile": (net, INNER | RATE | {"optimizer": choice("adam", "sgd"), "batch_size": count(2, or_none=True),
                                     "train_on": choice("all", "support"), "serial": flag(),
                                     "serial_rate": number(0.1, 0)}),
    "ProtoNet": (net, WAYS | {"metric": METRIC}),
    "MatchingNetwork": (net, WAYS | {"scale": number(10.0, 0, open=True), "learn_scale": flag(True),
                                     "full_context": flag(), "features": count(N, or_none=True), "steps": count(2)}),
    "RelationNetwork": (net, WAYS | {"relation": module(lambda: algorithms.RelationMLP(N)),
                                     "pool": choice("sum", "mean"), "loss": choice("mse", "cross_entropy")}),
    "RidgeHead": (net, WAYS | {"loss": choice("cross_entropy"), "ridge": number(1.0, 0, open=True),
                               "scale": number(1.0, or_none=True), "bias": number(0.0)}),
    "GradientHead": (net, WAYS | {"inner_lr": number(1.0, 0, open=True), "inner_steps": count(1, 0),
                                  "normalise": flag(True), "first_order": flag()}),
    "Hypernetwork": (net, WAYS | {"features": count(N), "mode": choice("head", "full", "lowrank"),
                                  "hidden": sizes(4), "activation": choice("relu", "tanh"), "set_width": count(4),
                                  "rank": count(2)}),
    "NearestNeighbour": (net, WAYS | {"rule": choice("mean", "nearest"),
                                      "centre": choice("none", "support", tensor=True),
                                      "normalise": flag(), "metric": METRIC}),
    "Contrastive": (net, WAYS | {"projection": module(lambda: nn.Linear(N, 4), or_none=True),
                                 "temperature": number(0.5, 0, open=True), "features": choice("encoder", "projection"),
                                 "head": choice("mean", "ridge"), "centre": choice("none", "support"),
                                 "ridge": number(1.0, 0, open=True), "fine_tune_steps": count(1, 0),
                                 "fine_tune_lr": number(0.1, 0, open=True)}),
    "InContextCAML": (net, WAYS | {"features": count(N), "max_ways": count(N), "code_width": count(5, N),
                                   "layers": count(1), "heads": count(2), "feedforward": count(8),
                                   "query_in_context": flag(True)}),
    "ConditionalCAML": (lambda: algorithms.FiLMMLP(N, [D, 4, N]), INNER | TASK_CHUNK | RATE | {
        "encoder": module(net), "metric_weight": number(0.5, 0), "adapts": function(lambda: None)}),
    "ModulatedProtoNet": (net, WAYS | {"base": module(lambda: algorithms.FiLMMLP(2 * N, [D, 4, 4])),
                                    "metric_weight": number(0.5, 0), "metric": METRIC}),
}  # fmt: skip


def learner_of(name: str, make: Callable[[], nn.Module], arguments: dict[str, Argument], **more):
    given = {key: argument.make() for key, argument in arguments.items()} | more
    return getattr(algorithms, name)(**{module_of(name): make()}, **given).eval()


def module_of(name: str) -> str:
    return "model" if "inner_steps" in LEARNERS[name][1] and name != "GradientHead" else "encoder"


def method_cases(name: str, learner: nn.Module, x: dict[str, Argument], y: dict[str, Argument]) -> None:
    def batched(method):
        return lambda support_x, support_y, query_x, query_y, **more: method(
            TaskBatch(support_x, support_y, query_x, query_y), **more
        )

    batch = {"support_x": x["support_x"], "support_y": y["support_y"], "query_x": x["query_x"], "query_y": y["query_y"]}
    # a learner says itself what it does with weights of another dtype than the losses'
    weighted = rates(floats(T, or_none=True))
    masked = isinstance(learner, EmbeddingLearner)
    of_support, of_query = ({"support_mask": mask(T, S)}, {"query_mask": mask(T, Q)}) if masked else ({}, {})
    case(f"{name}.forward", batched(learner), **batch, weights=weighted)
    case(f"{name}.adapt", learner.adapt, support_x=batch["support_x"], support_y=batch["support_y"], **of_support)
    state = learner.adapt(batch["support_x"].make(), batch["support_y"].make())
    case(f"{name}.predict", learner.predict, state=one_of(lambda: state), query_x=batch["query_x"], **of_query)
    if masked:
        constants = {key: argument.make() for key, argument in batch.items()}
        case(f"{name}.forward with masks", lambda **fields: learner(TaskBatch(**fields)), constants,
             **of_support, **of_query)  # fmt: skip
    whole = TaskBatch(*(argument.make() for argument in batch.values()))
    wrong = {"three": whole[:3], "five": (*whole, None), "dict": dict(zip(batch, whole, strict=True))}
    given = Argument(lambda: whole, dict(NO_TENSORS) | wrong, {"list": list(whole), "tuple": tuple(whole)})
    case(f"{name}.forward of a batch", learner.forward, batch=given)
    for method in ("gradients", "explain"):
        if hasattr(learner, method):
            more = {"weights": weighted} if method == "gradients" else {}
            given_to = batch if method == "gradients" else {key: unread(argument) for key, argument in batch.items()}
            case(f"{name}.{method}", batched(getattr(learner, method)), **given_to, **more)
            case(f"{name}.{method} of a batch", getattr(learner, method), batch=given)


X = {"support_x": floats(T, S, D, any_type=True), "query_x": floats(T, Q, D, any_type=True)}
Y = {"support_y": labels(T, S), "query_y": labels(T, Q)}
ANY = {"support_y": labels(T, S, any_label=True), "query_y": labels(T, Q, any_label=True)}  # of the support rows' own
for name, (make, options) in LEARNERS.items():
    first = module_of(name)
    case(name, getattr(algorithms, name), **{first: module(make)}, **options)
    examples = {key: widened(argument) for key, argument in X.items()} if name == "CAVIA" else X
    method_cases(name, learner_of(name, make, options), examples, Y if first == "model" else ANY)
IMAGES = {"support_x": floats(T, S, 1, 6, 6, any_type=True), "query_x": floats(T, Q, 1, 6, 6, any_type=True)}
VALUES = {"support_y": widened(floats(T, S, N, any_type=True)), "query_y": widened(floats(T, Q, N, any_type=True))}
for name, targets in (("MAML", Y), ("ANIL", Y), ("ProtoNet", ANY)):
    method_cases(f"{name} on images", learner_of(name, convolutions, LEARNERS[name][1]), IMAGES, targets)
for name in ("MAML", "CAVIA", "Reptile"):
    make, options = LEARNERS[name]
    examples = {key: widened(argument) for key, argument in X.items()} if name == "CAVIA" else X
    method_cases(f"{name} on values", learner_of(name, make, options, loss="mse"), examples, VALUES)
BETAS = {"None": None, "number": 0.1, "one": (0.1,), "NaN": (0.1, float("nan")), "texts": ("0", "1"), "1": (0.5, 1.0)}
case("MAML with Adam", algorithms.MAML, {"inner_optimizer": "adam"}, model=module(net), eps=number(1e-8, 0),
     betas=Argument(lambda: (0.5, 0.6), BETAS, {"list": [0.5, 0.6]}), amsgrad=flag())  # fmt: skip
case("BatchNormPerStep", algorithms.maml_plus_plus.BatchNormPerStep, num_features=count(3), steps=count(2),
     momentum=number(0.1, 0), eps=number(1e-5, 0), affine=flag(True), track_running_stats=flag(True))  # fmt: skip
case("FiLM", algorithms.FiLM, condition=count(4), channels=count(3), hidden=count(3))
case("FiLMConv4", algorithms.FiLMConv4, condition=count(4), in_channels=count(1), hidden=count(3))
case("FiLMMLP", algorithms.FiLMMLP, condition=count(4), sizes=sizes(5, 4, 3))
case("ContextFiLM", algorithms.ContextFiLM, context_size=count(4), channels=count(3))
case("ContextFiLMConv4", algorithms.ContextFiLMConv4, outputs=count(4), context_size=count(3), in_channels=count(1),
     hidden=count(3), image_size=count(28, 16), film_after=count(3))  # fmt: skip
case("RelationMLP", algorithms.RelationMLP, features=count(4), hidden=count(3))
case("RelationConv", algorithms.RelationConv, channels=count(4), hidden=count(3), linear=count(3), size=count(7, 4))
case("relation_encoder", algorithms.relation_encoder, in_channels=count(1), hidden=count(3))


@pytest.mark.parametrize("label, name", [(label, name) for label, case in CASES.items() for name in case.arguments])
def test_wrong_argument(label, name, few_glyphs):
    found = CASES[label]
    right = found.constants | {key: argument.make() for key, argument in found.arguments.items()}
    found.call(**right)  # or else nothing below means anything
    argument = found.arguments[name]
    problems = [problem_of(found, name, kind, value, False) for kind, value in argument.wrong.items()]
    problems += [problem_of(found, name, kind, value, True) for kind, value in argument.odd.items()]
    problems = [problem for problem in problems if problem is not None]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_batch_may_be_a_list_of_its_fields(name):
    make, options = LEARNERS[name]
    learner = learner_of(name, make, options)
    batch = TaskBatch(*((X | Y)[field].make() for field in ("support_x", "support_y", "query_x", "query_y")))
    for method in ("forward", "gradients"):
        if hasattr(learner, method):
            torch.manual_seed(0)
            wanted = getattr(learner, method)(batch)
            for given in (list(batch), tuple(batch), (*batch, None, None)):
                torch.manual_seed(0)
                torch.testing.assert_close(getattr(learner, method)(given), wanted, rtol=0, atol=0)


def test_a_model_of_another_dtype_is_named_with_its_examples():
    """Plain torch would say that two matrices must have the same dtype."""
    learner = algorithms.MAML(convolutions())
    x, y = torch.rand(2, 3, 1, 6, 6, dtype=torch.float64), torch.zeros(2, 3).long()
    for run in (lambda: learner((x, y, x, y)), lambda: learner.gradients((x, y, x, y)), lambda: learner.adapt(x, y)):
        with pytest.raises(TypeError, match="support_x is float64, but model's parameters are float32: .*type"):
            run()
    with pytest.raises(TypeError, match="support_x is float64, but encoder's parameters are float32: .*type"):
        algorithms.ProtoNet(convolutions())((x, y, x, y))


class Broken(nn.Module):
    """What fails here is the module's own."""

    def forward(self, x):
        raise RuntimeError("no flux")


@pytest.mark.parametrize("make", [algorithms.ProtoNet, lambda model: algorithms.MAML(nn.Sequential(net(), model))])
def test_an_error_of_the_module_itself_is_left_as_it_is(make):
    x, y = torch.rand(2, 3, 5), torch.zeros(2, 3).long()
    with pytest.raises(RuntimeError, match="^no flux$"):
        make(Broken())((x, y, x, y))


def test_looking_why_a_call_failed_changes_nothing():
    """Statistics of a batch norm and the random state are as after the call itself."""
    encoder = nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(4, 3))
    learner = algorithms.ProtoNet(encoder)
    x, y = torch.rand(2, 3, 5), torch.zeros(2, 3).long()
    torch.manual_seed(0)
    with pytest.raises(RuntimeError):
        encoder(torch.cat([x, x], 1).flatten(0, 1))
    mean, state = encoder[0].running_mean.clone(), torch.get_rng_state()
    encoder[0].reset_running_stats()
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"support_x has rows of shape \[5\], which encoder does not take: mat1 and"):
        learner((x, y, x, y))
    assert torch.equal(encoder[0].running_mean, mean) and torch.equal(torch.get_rng_state(), state)
