"""What a run is: every choice that decides its result, with the published defaults filled in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from .. import values
from ..dispatch.backends import METRICS
from ..engines.select import check_name
from ..nn import NORMS
from ..tasks import NAMES as DATA
from ..tasks import Data, Examples, TaskRows, open_data
from ..tasks.augment import HANDWRITING, Augmentation
from ..tasks.omniglot import PARTITIONS
from ..tasks.read import is_form, parse
from .registry import ALGORITHMS
from .schedule import SCHEDULES

MODELS = ("mlp", "conv4", "none")
AUTOCAST = ("bf16",)
LABELS = ("true", "augment", "cluster")
# beyond these PyTorch ends in an overflow, and OpenMP without a word
_LARGEST, _MOST_THREADS = 2**31 - 1, 1024
# of own data
_LEAST_SIDE = 16  # of images for a conv4
_MOST_WAYS = 20  # of training tasks by default
_PERSON_WAYS = 3


@dataclass(frozen=True)
class RunConfig:
    """All choices of a run. Build one with `run_config`; it is stored in every checkpoint.

    `ways`, `shots` and `query_shots` describe validation and test tasks (support `[T, ways * shots, ...]`,
    query `[T, ways * query_shots, ...]`), their `train_` namesakes the training tasks. Regression has `ways`
    1.

    `labels` says what the training tasks' classes are: `"true"` the data's own; `"augment"` augmentations of single
    images (`~fastmeta.tasks.AugmentedTasks`, with `augmentation` and `augment_support`); `"cluster"` clusters
    (`~fastmeta.tasks.ClusterTasks`) of what the encoder of `cluster_checkpoint` makes of the images, or of pixels.
    Validation and test tasks always have the data's own.

    `data` is a name, or a line as `~fastmeta.tasks.open_data` takes it: where own data lies, and how it
    is read and split.
    """

    algorithm: str
    data: str
    ways: int
    shots: int
    query_shots: int
    train_ways: int
    train_shots: int
    train_query_shots: int
    model: str
    hidden: tuple[int, ...]  # empty for the model "none"
    task_batch: int
    iterations: int | None
    minutes: float | None = None
    norm: str = "none"
    # a safetensors file that the backbone's weights come from at the start, and whether they stay as they are
    encoder: str | None = None
    freeze_encoder: bool = False
    inner_lr: float = 0.01
    inner_steps: int = 1
    eval_inner_steps: int = 1
    first_order: bool = False
    metric: str = "sqeuclidean"
    outer_lr: float = 1e-3
    lr_schedule: str = "constant"
    lr_halve_every: int = 0
    seed: int = 0
    device: str = "auto"
    partition: str = "vinyals"
    rotations: bool = True  # whether every rotation of a class of images is a class
    data_root: str | None = None
    labels: str = "true"
    augmentation: tuple[tuple[str, float], ...] = ()
    augment_support: bool = False
    cluster_checkpoint: str | None = None
    clusters: int = 500
    cluster_partitions: int = 1
    engine: str = "auto"
    task_chunk: int | str | None = None
    autocast: str | None = None
    compile: bool = False
    capture: bool = False
    prefetch: bool = False
    threads: int | None = None
    eval_every: int = 500
    eval_tasks: int = 600
    save_every: int = 500
    skip_non_finite: bool = False
    # arguments of the algorithm's own, by name: what `--set` gives
    settings: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        choices = {
            "algorithm": tuple(ALGORITHMS), "model": MODELS, "norm": NORMS, "metric": METRICS,
            "partition": PARTITIONS, "labels": LABELS, "lr_schedule": SCHEDULES,
        }  # fmt: skip
        for name, allowed in choices.items():
            values.choice(name, getattr(self, name), allowed)
        check_data(self.data)
        counts = ("ways", "shots", "query_shots", "train_ways", "train_shots", "train_query_shots", "task_batch")
        for name in (*counts, "eval_tasks", "clusters", "cluster_partitions"):
            values.count(name, getattr(self, name))
        for name in ("threads", "iterations"):
            if getattr(self, name) is not None:
                values.count(name, getattr(self, name))
        if self.autocast is not None:
            values.choice("autocast", self.autocast, AUTOCAST)
        if self.task_chunk is not None and not (isinstance(self.task_chunk, str) and self.task_chunk == "auto"):
            values.count("task_chunk", self.task_chunk)
        for name in ("inner_steps", "eval_inner_steps", "lr_halve_every", "eval_every", "save_every"):
            values.count(name, getattr(self, name), 0)
        for name in ("inner_lr", "outer_lr", *(() if self.minutes is None else ("minutes",))):
            values.number(name, getattr(self, name), 0, open=True)
        of_the_way = ("skip_non_finite", "compile", "capture", "prefetch")
        for name in ("first_order", "augment_support", "freeze_encoder", "rotations", *of_the_way):
            values.flag(name, getattr(self, name))
        for name in ("data_root", "cluster_checkpoint", "encoder"):
            values.path(name, getattr(self, name), or_none=True)
        check_name(self.engine)
        if values.name("device", self.device) != "auto":
            values.device("device", self.device, here=False)
        values.seed("seed", self.seed)
        values.counts("hidden", self.hidden)
        sizes = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "seed"}
        sizes |= {"hidden": max(self.hidden, default=0)}
        for name, value in sizes.items():
            most = _MOST_THREADS if name == "threads" else _LARGEST
            if type(value) is int and value > most:
                raise ValueError(f"{name} must be at most {most}, got {value}")
        if self.iterations is None and self.minutes is None:
            raise ValueError("iterations or minutes must be given: one of them ends the run")
        if self.lr_schedule == "halve" and self.lr_halve_every < 1:
            raise ValueError("lr_schedule 'halve' needs lr_halve_every of at least 1")
        if self.lr_schedule == "cosine" and self.iterations is None:
            raise ValueError("lr_schedule 'cosine' needs iterations: a time budget does not say where the cosine ends")
        if self.norm != "none" and self.model != "mlp":
            raise ValueError(f"norm is of model mlp; {self.model} has batch norms of its own: leave norm out")
        if self.freeze_encoder and self.encoder is None:
            raise ValueError("freeze_encoder needs encoder: the file that its weights come from")
        if self.model == "none":
            self._check_no_model()
        elif not self.hidden:
            raise ValueError(f"hidden must be one or more widths of at least 1, got {list(self.hidden)}")
        if self.model == "conv4" and len(self.hidden) != 1:
            raise ValueError(f"hidden must be one number of channels for conv4, got {list(self.hidden)}")
        if self.regression:
            if "regression" not in ALGORITHMS[self.algorithm].kinds:
                raise ValueError(
                    f"{self.algorithm} classifies, and {self.data} is regression: use maml, or data glyphs or omniglot"
                )
            if self.ways != 1 or self.train_ways != 1:
                raise ValueError(f"{self.data} is regression, it has no ways: leave ways out")
        if self.model == "conv4" and self._of_numbers():
            raise ValueError(f"conv4 needs images, and {self.data} has numbers: use model mlp")
        self._check_labels()
        own = ALGORITHMS[self.algorithm].settings
        for name, value in self.settings:
            if name not in own:
                raise ValueError(f"settings of {self.algorithm} are {', '.join(own) or 'none'}; got {name!r}")
            fits = isinstance(value, type(own[name])) and isinstance(value, bool) == isinstance(own[name], bool)
            if not fits and own[name] is not None:
                raise ValueError(f"setting {name} must be {type(own[name]).__name__}, got {value!r}")
        if ALGORITHMS[self.algorithm].fixed_ways and self.train_ways != self.ways:
            raise ValueError(
                f"train_ways must equal ways for {self.algorithm}, whose last layer has one output per class: "
                f"got {self.train_ways} and {self.ways}"
            )

    def _check_no_model(self) -> None:
        if self.hidden:
            raise ValueError(f"hidden is of mlp and conv4; model is 'none': leave hidden out, got {list(self.hidden)}")
        if self.encoder is not None:
            raise ValueError("encoder needs a backbone for its weights; model is 'none'")
        if not ALGORITHMS[self.algorithm].without_model:
            able = ", ".join(name for name, entry in ALGORITHMS.items() if entry.without_model)
            raise ValueError(f"model 'none' leaves {self.algorithm} nothing to train or modulate; {able} serve it")

    @property
    def regression(self) -> bool:
        """Whether tasks are of numbers to be told, not of classes."""
        return self.data == "sinusoid" or (is_form(self.data) and parse(self.data).kind == "regression")

    @property
    def data_name(self) -> str:
        """Of the data in names of folders."""
        return parse(self.data).name if is_form(self.data) else self.data

    def _of_numbers(self) -> bool:
        return self.data == "sinusoid" or (is_form(self.data) and parse(self.data).form in ("csv", "parquet"))

    def _check_labels(self) -> None:
        if self._of_numbers() and self.labels != "true":
            raise ValueError(f"labels {self.labels!r} needs images, and {self.data} has numbers: leave labels out")
        if self.labels != "augment" and (self.augmentation or self.augment_support):
            raise ValueError(f"augmentation and augment_support are of labels 'augment'; labels is {self.labels!r}")
        if self.labels != "cluster" and self.cluster_checkpoint is not None:
            raise ValueError(f"cluster_checkpoint is of labels 'cluster'; labels is {self.labels!r}")
        self.augment()
        views = (self.train_shots, self.train_query_shots)
        if self.algorithm == "contrastive" and views != (1, 1):
            raise ValueError(
                "train_shots and train_query_shots must be 1 for contrastive, whose tasks are two views of each image: "
                f"got {views[0]} and {views[1]}"
            )

    def augment(self) -> Augmentation:
        """The augmentation of `labels` "augment"."""
        allowed = tuple(field.name for field in dataclasses.fields(Augmentation))
        for name, _ in self.augmentation:
            if name not in allowed:
                raise ValueError(f"augmentation has {', '.join(allowed)}; got {name!r}")
        return dataclasses.replace(HANDWRITING, **dict(self.augmentation))

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, chosen: dict[str, Any]) -> RunConfig:
        """The inverse of `as_json`. A key that this version does not know raises ValueError."""
        unknown = chosen.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown settings {', '.join(sorted(unknown))}: written by another version of fastmeta")
        named = {
            key: tuple((name, value) for name, value in chosen.get(key, ())) for key in ("settings", "augmentation")
        }
        return cls(**{**chosen, "hidden": tuple(chosen["hidden"]), **named})


def check_data(data: str) -> None:
    """Raise ValueError unless `data` is a known name, or a line of own data that can be read."""
    if isinstance(data, str) and is_form(data):
        parse(data)
    else:
        values.choice("data", data, (*DATA, "folder:PATH and other forms of own data"))


def run_config(algorithm: str, data: str, *, opened: Data | None = None, **given: Any) -> RunConfig:
    """A `RunConfig` with what is `given` (None counts as not given) and published settings for the rest.

    Of own data the defaults depend on what it is: images of at least 16 x 16 get a conv4, other rows an mlp. Tasks have
    no more ways than there are classes large enough, in training 20 at most, and no more queries than a class of middle
    size has rows for. `opened` is what `~fastmeta.tasks.open_data` made of it, if that was called already.

    Sources: MAML on sinusoids, section 5.1 of Finn et al. 2017 (10 shots, one step of 0.01 in training) with
    more tasks per step; MAML on images, their section A.1 (20-way: five steps of 0.1); prototypical networks,
    Snell et al. 2017, section 3.1 (60-way episodes of 5 queries, Adam at 1e-3 halved every 2,000 episodes).
    """
    values.choice("algorithm", algorithm, tuple(ALGORITHMS))
    check_data(data)
    given = {key: value for key, value in given.items() if value is not None}
    for name, least in (("ways", 1), ("inner_steps", 0), ("eval_every", 0)):  # what defaults are made of
        if name in given:
            values.count(name, given[name], least)
    for name, allowed in (("model", MODELS), ("labels", LABELS)):
        if name in given:
            values.choice(name, given[name], allowed)
    if "hidden" in given:
        values.counts("hidden", given["hidden"])
    for name in ("augmentation", "settings"):
        if name in given and not isinstance(given[name], (tuple, list, dict)):
            raise TypeError(f"{name} must hold names with their values, got {values.shown(given[name])}")
    source = _source(data, opened)
    chosen = _defaults(algorithm, source, given)
    entry = ALGORITHMS[algorithm]
    chosen.update(entry.sinusoid if source.regression else entry.images)
    if source.own is not None and not source.regression:
        chosen.update(_own(source.own, chosen, given))
    if given.get("minutes") is not None and "iterations" not in given:
        chosen["iterations"] = None
    if given.get("lr_halve_every") and "lr_schedule" not in given:
        chosen["lr_schedule"] = "halve"
    chosen.update(given)
    if chosen["model"] == "conv4" and source.own is not None and not source.images:
        shape = list(source.own.input_shape)
        least = f"{_LEAST_SIDE} x {_LEAST_SIDE}"
        raise ValueError(f"conv4 needs images of at least {least}, and {data} has {shape}: use mlp")
    if "inner_steps" in given and "eval_inner_steps" not in given:
        chosen["eval_inner_steps"] = max(chosen.get("eval_inner_steps", 0), given["inner_steps"])
    for name in ("ways", "shots", "query_shots"):
        chosen.setdefault(f"train_{name}", chosen[name])
    if chosen.get("labels") == "augment":  # all of it, so that a run that goes on does not depend on later defaults
        chosen["augmentation"] = tuple((dataclasses.asdict(HANDWRITING) | dict(chosen.get("augmentation", ()))).items())
    elif "augment_support" not in given:
        chosen.pop("augment_support", None)
    chosen.setdefault("save_every", chosen.get("eval_every") or RunConfig.save_every)
    if "hidden" in chosen:
        chosen["hidden"] = tuple(chosen["hidden"])
    return RunConfig(algorithm=algorithm, data=data, **chosen)


@dataclass(frozen=True)
class _Source:
    """What defaults depend on; `own` is data of the user's own."""

    regression: bool
    images: bool
    own: Data | None = None


def _source(data: str, opened: Data | None) -> _Source:
    if not is_form(data):
        return _Source(data == "sinusoid", data != "sinusoid")
    opened = open_data(data) if opened is None else opened
    part, shape = opened.part("train"), opened.input_shape
    if part.rows.dtype != torch.uint8 and not part.rows.is_floating_point():
        raise ValueError(
            f"{data}: rows of {values.dtype_of(part.rows)} are token ids, which need a model of your own; write "
            "features as float32"
        )
    images = len(shape) == 3 and min(shape[1:]) >= _LEAST_SIDE
    return _Source(opened.kind == "regression", images, opened)


def _own(data: Data, defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Which of the defaults of classification are others for own data: tasks that it has."""
    train, chosen = data.part("train"), {**defaults, **given}
    if isinstance(train, TaskRows):
        ways = given.get("ways", min(_PERSON_WAYS, len(train.classes)))
        return {"rotations": False, "ways": ways, "train_ways": ways, "query_shots": 5, "train_query_shots": 5}
    shots, train_shots = chosen["shots"], chosen.get("train_shots", chosen["shots"])
    judged = [part for part in (data.val, data.test) if part is not None]
    found: dict[str, Any] = {"rotations": False}
    found["query_shots"] = min([chosen["query_shots"], *(_left(part, shots) for part in judged)])
    each = shots + given.get("query_shots", found["query_shots"])
    found["ways"] = max(2, min([chosen["ways"], *(_classes_of(part, each) for part in judged)]))
    if chosen.get("labels", "true") == "true":
        found["train_query_shots"] = min(chosen["train_query_shots"], _left(train, train_shots))
        if "train_ways" in chosen:
            each = train_shots + given.get("train_query_shots", found["train_query_shots"])
            ways = min(_MOST_WAYS, chosen["train_ways"], _classes_of(train, each))
            found["train_ways"] = max(given.get("ways", found["ways"]), ways)
    return found


def _left(part: Examples, shots: int) -> int:
    """Rows that a class of middle size has for queries."""
    return max(1, int(part.counts.median()) - shots)


def _classes_of(part: Examples, rows: int) -> int:
    return int((part.counts >= rows).sum())


def _defaults(algorithm: str, source: _Source, given: dict[str, Any]) -> dict[str, Any]:
    if source.regression:
        inner_steps = given.get("inner_steps", 1)
        return {
            "ways": 1,
            "shots": 10,
            "query_shots": 10,
            "model": "mlp",
            "hidden": (40, 40),
            "inner_lr": 0.01,
            "eval_inner_steps": inner_steps,
            "task_batch": 100,
            "iterations": 20_000,
            "eval_every": 1000,
        }
    model = given.get("model", "conv4" if source.images else "mlp")
    ways = given.get("ways", 5)
    common = {
        "ways": 5,
        "shots": 1,
        "query_shots": 15,
        "train_query_shots": 5,
        "model": model,
        "hidden": {"conv4": (64,), "none": ()}.get(model, (256, 128, 64, 64)),
    }
    if ALGORITHMS[algorithm].group == "metric":
        return {
            **common,
            "train_ways": max(ways, 60),
            "task_batch": 1,
            "iterations": 20_000,
            "lr_schedule": "halve",
            "lr_halve_every": 2000,
        }
    many = ways > 5
    inner_steps = given.get("inner_steps", 5 if many else 1)
    return {
        **common,
        "inner_lr": 0.1 if many else 0.4,
        "inner_steps": inner_steps,
        "eval_inner_steps": max(3, inner_steps),
        "task_batch": 16 if many else 32,
        "iterations": 60_000,
    }
