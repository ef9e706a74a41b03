"""Wrong calls of everything public: one argument at a time of a call that is right is replaced by what it cannot be.

Each must raise a TypeError or ValueError of fastmeta's own that names the argument, or, where the value may be meant,
do what it says. Nothing may come from deeper: an attribute that a list does not have, a kernel that is missing for a
layout, a number that torch refuses.
"""

from __future__ import annotations

import importlib
import re
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import fastmeta
from fastmeta import algorithms, functional, irl, tasks, training
from fastmeta.algorithms import film
from fastmeta.nn import conv4, mlp
from fastmeta.tasks import TaskBatch

T, S, Q, N, D = 2, 6, 4, 3, 5
HOME = str(Path(fastmeta.__file__).parent)
NO_TENSORS = {"None": None, "text": "text", "number": 3.5, "list": [1.0, 2.0], "numpy": np.ones((2, 3, 4))}
NAN, INF = float("nan"), float("inf")


class Argument(NamedTuple):
    """The right value, anew for each call; values that must be refused; values that may be served instead."""

    make: Callable[[], Any]
    wrong: dict[str, Any]
    odd: dict[str, Any]


def layouts(t: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same numbers in what no kernel here reads."""
    found = {"COO": t.to_sparse(), "complex": t.to(torch.complex64), "meta": t.to("meta")}
    if t.dim() > 1:
        found["CSR"] = t.to_sparse_csr()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found["nested"] = torch.nested.nested_tensor(list(t.unbind()))
            found["jagged"] = torch.nested.nested_tensor(list(t.unbind()), layout=torch.jagged)
    if t.dtype == torch.float32:
        found["mkldnn"] = t.to_mkldnn()
        found["quantized"] = torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)
    return found


def shapes(t: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {"one dimension more": t.unsqueeze(0), "no dimension": t.flatten()[:1].view(())}
    if t.dim():
        found["one dimension less"] = t[0]
    for axis in range(t.dim()):
        found[f"size {axis} more by one"] = torch.cat([t, t.narrow(axis, 0, 1)], axis)
        found[f"size {axis} of 0"] = t.narrow(axis, 0, 0)
    return found


def floats(*shape, alone: bool = False, or_none: bool = False, any_type: bool = False) -> Argument:
    """`alone`: no other tensor says which dtype this is. `any_type`: a module or loss says what it takes."""
    right = torch.rand(shape)
    wrong = dict(NO_TENSORS) | layouts(right)
    odd = shapes(right) | {"float16": right.half(), "float64": right.double(), "meta": wrong.pop("meta")}
    if not alone:
        wrong |= {"float16": odd.pop("float16"), "float64": odd.pop("float64")}
    integers = {"int64": right.long(), "bool": right > 0.5, "uint8": right.byte()}
    odd, wrong = (odd | integers, wrong) if any_type else (odd, wrong | integers)
    if or_none:
        del wrong["None"]
    return Argument(lambda: right.clone(), wrong, odd)


def labels(*shape) -> Argument:
    right = (torch.arange(shape[-1]) % N).expand(shape).clone()
    wrong = dict(NO_TENSORS) | layouts(right) | {"float32": right.float(), "int32": right.int(), "bool": right > 0}
    wrong |= {"float16": right.half(), "negative": right - 1, "too large": right + 7}
    return Argument(lambda: right.clone(), wrong, shapes(right) | {"meta": wrong.pop("meta")})


def mask(*shape) -> Argument:
    right = torch.ones(shape, dtype=torch.bool)
    wrong = dict(NO_TENSORS) | layouts(right) | {"float32": right.float(), "int64": right.long()}
    del wrong["None"]
    return Argument(lambda: right.clone(), wrong, shapes(right) | {"meta": wrong.pop("meta")})


def rates(argument: Argument) -> Argument:
    """Rates may be plain numbers too, and have any of the floating dtypes."""
    fine = ("number", "list", "float16", "float64")
    served = {label for label in argument.wrong if label in fine or label.removeprefix("[0] ") in fine}
    wrong = {label: value for label, value in argument.wrong.items() if label not in served}
    return Argument(argument.make, wrong, argument.odd | {label: argument.wrong[label] for label in served})


def layers(*parameters: tuple[int, ...], or_none: bool = False) -> Argument:
    right = [torch.rand(shape) for shape in parameters]
    wrong: dict[str, Any] = {k: v for k, v in NO_TENSORS.items() if not (or_none and v is None)}
    first = floats(*parameters[0])
    wrong |= {f"[0] {label}": [value, *right[1:]] for label, value in first.wrong.items()}
    wrong["a tensor"] = right[0]
    odd = {f"[0] {label}": [value, *right[1:]] for label, value in first.odd.items()}
    odd |= {"none": [], "half of them": right[:1], "one more": [*right, right[0]]}
    return Argument(lambda: [t.clone() for t in right], wrong, odd)


def count(right: int, least: int = 1, or_none: bool = False) -> Argument:
    wrong = {"None": None, "text": "3", "number": 3.5, "whole number": 3.0, "bool": True, "list": [3]}
    wrong |= {"too small": least - 1, "NaN": NAN, "numpy": np.ones(2), "tensor": torch.ones(2)}
    if or_none:
        del wrong["None"]
    return Argument(lambda: right, wrong, {"the least": least})


def number(
    right: float, least: float = -INF, *, open: bool = False, or_none: bool = False, below: float | None = None
) -> Argument:
    wrong = {"None": None, "text": "0.1", "bool": True, "list": [0.1], "NaN": NAN, "inf": INF, "-inf": -INF}
    wrong |= {"numpy": np.ones(2), "complex": 1j, "meta": torch.ones((), device="meta")}
    if least > -INF:
        wrong["too small"] = least - 0.5
        if open:
            wrong["the bound"] = least
    if below is not None:
        wrong["too large"] = below
    if or_none:
        del wrong["None"]
    return Argument(lambda: right, wrong, {"whole": 1 if below is None else 0})


def flag(right: bool = False) -> Argument:
    wrong = {"None": None, "text": "no", "int": 1, "number": 0.0, "list": [], "tensor": torch.ones(())}
    return Argument(lambda: right, wrong, {"the other": not right})


def choice(right: str, *others: str, or_none: bool = False) -> Argument:
    wrong = {"None": None, "text": "text", "number": 3.5, "bool": True, "list": [right], "set": {right}}
    wrong |= {"capitals": right.upper(), "tensor": torch.ones(2), "numpy": np.ones(2)}
    if or_none:
        del wrong["None"]
    return Argument(lambda: right, wrong, {other: other for other in others})


def module(make: Callable[[], nn.Module], or_none: bool = False) -> Argument:
    wrong = dict(NO_TENSORS) | {"class": nn.Linear, "function": torch.relu, "tensor": torch.ones(2)}
    if or_none:
        del wrong["None"]
    return Argument(make, wrong, {})


def function(make: Callable[[], Any], or_none: bool = True) -> Argument:
    wrong = dict(NO_TENSORS) | {"bool": True, "tensor": torch.ones(2)}
    if or_none:
        del wrong["None"]
    return Argument(make, wrong, {})


def sizes(*right: int, or_none: bool = False) -> Argument:
    wrong = {"None": None, "text": "text", "number": 3.5, "int": 3, "tensor": torch.ones(2), "numpy": np.ones((2, 2))}
    wrong |= {"floats": [float(r) for r in right], "texts": ["3"] * len(right), "zeros": [0] * len(right)}
    wrong |= {"bools": [True] * len(right), "negative": [-1] * len(right), "None in it": [None] * len(right)}
    return Argument(lambda: list(right), wrong, {"tuple": right})


def generator() -> Argument:
    wrong = {"text": "text", "number": 3.5, "int": 3, "list": [1], "numpy": np.random.default_rng(0)}
    return Argument(lambda: None, wrong, {"given": torch.Generator()})


def device() -> Argument:
    wrong = {"text": "text", "number": 3.5, "None": None, "list": ["cpu"], "bool": True, "no GPU": "mps"}
    return Argument(lambda: "cpu", wrong, {"device": torch.device("cpu"), "meta": "meta"})


def one_of(right: Callable[[], Any], *odd: Any) -> Argument:
    """An object of a kind of its own."""
    return Argument(right, dict(NO_TENSORS) | {"bool": True}, {repr(value): value for value in odd})


def seed() -> Argument:
    wrong = {"None": None, "text": "3", "number": 3.5, "bool": True, "list": [3], "NaN": NAN, "tensor": torch.ones(2)}
    return Argument(lambda: 0, wrong, {"large": 2**40, "negative": -1})


class Case(NamedTuple):
    call: Callable
    arguments: dict[str, Argument]
    constants: dict[str, Any] = {}


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
        names = [name, *case.arguments] if may_be_served else [name]
        if type(error) not in (TypeError, ValueError, training.CheckpointError):
            return f"{name} = {label}: {type(error).__name__}"
        if not where.filename.startswith(HOME):
            return f"{name} = {label}: an inner message, {error!r:.120}"
        if not any(re.search(rf"\b{key}\b", str(error)) for key in names):
            return f"{name} = {label}: does not name it, {error!r:.120}"
        return None
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{name} = {label}: {type(error).__name__}, {str(error)[:90]!r} from {where.filename[-30:]}:{where.lineno}"
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
case("use_backend", lambda name: fastmeta.use_backend(name).__enter__(), name=choice("reference"))
case("check_labels", lambda enabled: fastmeta.check_labels(enabled), enabled=flag(True))

# ------------------------------------------------------------------------------------------------------- tasks, nn
IMAGES = Argument(
    lambda: torch.rand(6, 4, 1, 8, 8),
    dict(NO_TENSORS) | layouts(torch.rand(6, 4, 1, 8, 8)) | {"int64": torch.ones(6, 4, 1, 8, 8).long()},
    shapes(torch.rand(6, 4, 1, 8, 8)) | {"uint8": torch.ones(6, 4, 1, 8, 8).byte(), "bool": torch.ones(6, 4, 1, 8, 8) > 0},
)
SIZES = {"ways": count(2), "shots": count(1), "query_shots": count(2)}


def sampled(make):
    return lambda num_tasks, generator: make().sample(num_tasks, generator=generator)


case("make_tasks", tasks.make_tasks, name=choice("sinusoid"), split=choice("train", "test"),
     ways=count(5, or_none=True), shots=count(3, or_none=True), query_shots=count(3, or_none=True), device=device(),
     seed=seed(), partition=choice("vinyals"))  # fmt: skip
case("load_images", tasks.load_images, {"split": "val"}, name=choice("glyphs"), seed=seed(), partition=choice("vinyals"))
case("glyphs", tasks.glyphs, split=choice("val"), seed=seed())
case("SinusoidTasks", tasks.SinusoidTasks, shots=count(3), query_shots=count(3), device=device())
case("SinusoidTasks.sample", sampled(tasks.SinusoidTasks), num_tasks=count(2, 0), generator=generator())
case("EpisodeSampler", tasks.EpisodeSampler, images=IMAGES, **SIZES, rotations=flag())
case("EpisodeSampler.sample", sampled(lambda: tasks.EpisodeSampler(torch.rand(6, 4, 1, 8, 8), ways=2, shots=1,
     query_shots=2)), num_tasks=count(2, 0), generator=generator())  # fmt: skip
case("AugmentedTasks", tasks.AugmentedTasks, images=IMAGES, **SIZES, augmentation=function(tasks.Augmentation, False),
     augment_support=flag(), rotations=flag())  # fmt: skip
case("AugmentedTasks.sample", sampled(lambda: tasks.AugmentedTasks(torch.rand(6, 1, 8, 8), ways=2)),
     num_tasks=count(2, 0), generator=generator())  # fmt: skip
PARTITIONS = Argument(
    lambda: torch.arange(24).fmod(4),
    dict(NO_TENSORS) | layouts(torch.arange(24).fmod(4)) | {"float": torch.arange(24).fmod(4).float()},
    shapes(torch.arange(24).fmod(4)),
)
case("ClusterTasks", tasks.ClusterTasks, images=IMAGES, partitions=PARTITIONS, **SIZES, rotations=flag())
case("ClusterTasks.sample", sampled(lambda: tasks.ClusterTasks(torch.rand(6, 4, 1, 8, 8), torch.arange(24).fmod(4),
     ways=2)), num_tasks=count(2, 0), generator=generator())  # fmt: skip
case("kmeans_partitions", tasks.kmeans_partitions, embeddings=floats(12, 3, alone=True, any_type=True), clusters=count(2),
     partitions=count(1), seed=seed())  # fmt: skip
case("embed_images", tasks.embed_images, encoder=module(nn.Flatten), images=IMAGES)
case("Augmentation", tasks.Augmentation, rotate=number(5.0, 0), scale=number(0.1, 0), shift=number(0.1, 0),
     crop=number(0.1, 0, below=1.0), thicken=number(0.1, 0, below=1.5), drop=number(0.1, 0, below=1.0))  # fmt: skip
case("Augmentation()", tasks.Augmentation(rotate=5.0, drop=0.1, thicken=0.1),
     images=Argument(lambda: torch.rand(3, 1, 8, 8), dict(NO_TENSORS) | layouts(torch.rand(3, 1, 8, 8)),
                     shapes(torch.rand(3, 1, 8, 8))), generator=generator())  # fmt: skip
case("mlp", mlp, sizes=sizes(5, 4, 3), activation=choice("relu", "gelu"), bias=flag(True), norm=choice("batch", "none"),
     track_running_stats=flag(True))  # fmt: skip
case("conv4", conv4, in_channels=count(1), hidden=count(4), track_running_stats=flag(True))

# -------------------------------------------------------------------------------------------------------------- irl
WORLD = {"samples": count(3), "demonstrations": count(2), "horizon": count(3), "strength": number(1.0), "device": device()}
case("GridworldTasks", lambda **given: irl.GridworldTasks(**given), size=count(3, 2), colours=count(3, 3), code=count(4),
     distractors=count(2, 0), seed=seed(), **WORLD)  # fmt: skip
case("PointMassTasks", lambda **given: irl.PointMassTasks(**given), width=number(0.4, 0, open=True),
     velocity=number(0.1, 0, open=True), noise=number(0.1, 0, open=True), candidates=count(4), starts=count(2),
     **WORLD)  # fmt: skip
for world in (irl.GridworldTasks, irl.PointMassTasks):
    made = world(horizon=3, demonstrations=2, samples=2)
    case(f"{world.__name__}.sample", made.sample, num_tasks=count(2, 0), generator=generator())
    case(f"{world.__name__}.worlds", made.worlds, num_tasks=count(2, 0), generator=generator())
    case(f"{world.__name__}.demonstrate", made.demonstrate, worlds=one_of(lambda made=made: made.worlds(2)),
         demonstrations=count(2), generator=generator())  # fmt: skip
    case(f"{world.__name__}.value_difference", made.value_difference, worlds=one_of(lambda made=made: made.worlds(2)),
         rewards=floats(2, 36 if world is irl.GridworldTasks else 8 * 128 * 3, 1, alone=True),
         **({} if world is irl.GridworldTasks else {"states": one_of(lambda made=made: made.states(made.worlds(2)))}))  # fmt: skip
case("MaxEntLoss", irl.MaxEntLoss, samples=count(2), horizon=count(3))
case("MaxEntLoss()", irl.MaxEntLoss(2, 3), rewards=floats(18, 1, alone=True), targets=floats(18, 1, alone=True))
case("TabularMaxEntLoss", irl.TabularMaxEntLoss, samples=count(2))
case("TabularMaxEntLoss()", irl.TabularMaxEntLoss(2), rewards=floats(5, 1, alone=True), targets=floats(5, 6, alone=True))


@pytest.fixture(autouse=True)
def few_glyphs(monkeypatch):
    """Drawing the whole alphabet takes seconds."""
    monkeypatch.setattr(importlib.import_module("fastmeta.tasks.glyphs"), "CLASSES", {"train": 6, "val": 6, "test": 6})


@pytest.mark.parametrize("label, name", [(label, name) for label, case in CASES.items() for name in case.arguments])
def test_wrong_argument(label, name):
    found = CASES[label]
    right = found.constants | {key: argument.make() for key, argument in found.arguments.items()}
    found.call(**right)  # or else nothing below means anything
    argument = found.arguments[name]
    problems = [problem_of(found, name, kind, value, False) for kind, value in argument.wrong.items()]
    problems += [problem_of(found, name, kind, value, True) for kind, value in argument.odd.items()]
    problems = [problem for problem in problems if problem is not None]
    assert not problems, "\n".join(problems)
