"""The command line's options: type, help and printed default of each. `main.py` says which command takes which."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

ALGORITHM_NAMES = (
    "maml", "metasgd", "anil", "boil", "maml++", "cavia", "reptile", "imaml", "protonet", "matching", "relation",
    "ridge", "gradient-head", "hypernetwork", "modulated-protonet", "caml-conditional", "caml-incontext",
    "contrastive",
)  # fmt: skip
# kept equal to `training.registry.ALGORITHMS`, which takes too long to import for --help
AlgorithmName = Enum("AlgorithmName", {name: name for name in ALGORITHM_NAMES}, type=str)


DATA_NAMES = ("sinusoid", "glyphs", "omniglot")  # kept equal to `tasks.NAMES`, which takes too long to import


class WorldName(str, Enum):
    gridworld = "gridworld"
    pointmass = "pointmass"


class ModelName(str, Enum):
    mlp = "mlp"
    conv4 = "conv4"
    none = "none"


class NormName(str, Enum):
    none = "none"
    batch = "batch"
    layer = "layer"


class ScheduleName(str, Enum):
    constant = "constant"
    halve = "halve"
    cosine = "cosine"


class MetricName(str, Enum):
    sqeuclidean = "sqeuclidean"
    euclidean = "euclidean"
    cosine = "cosine"
    dot = "dot"
    manhattan = "manhattan"


class PartitionName(str, Enum):
    vinyals = "vinyals"
    c1200 = "1200"


class AutocastName(str, Enum):
    bf16 = "bf16"


class OnErrorName(str, Enum):
    refuse = "refuse"
    skip = "skip"


class LabelsName(str, Enum):
    true = "true"
    augment = "augment"
    cluster = "cluster"


class SplitName(str, Enum):
    train = "train"
    val = "val"
    test = "test"


_debug = False


def debugging() -> bool:
    """Whether `--debug` was given."""
    return _debug


def _set_debug(value: bool) -> bool:
    global _debug
    _debug = value
    return value


def _read_config(ctx: typer.Context, value: Path | None) -> Path | None:
    if value is not None:
        from .config_file import options_of

        ctx.default_map = {**(ctx.default_map or {}), **options_of(value, ctx)}
    return value


def _number_or_auto(value: str | None) -> int | str | None:
    if value is None or value == "auto":
        return value
    if not (value.isascii() and value.isdecimal() and int(value)):
        raise typer.BadParameter(f"must be a whole number of at least 1, or auto, got {value!r}")
    return int(value)


def _after_the_file(ctx: typer.Context, param: typer.CallbackParam, value: list[str] | None) -> list[str]:
    """Of an option that may be given often: what `--config` says, then what the command line does."""
    return [*((ctx.default_map or {}).get(param.name) or ()), *(value or ())]


def _option(panel: str | None, kind: type, flag: str, help: str, default: str | bool = False, **more: Any) -> Any:
    """An option that is None unless given: its default, printed as `default`, depends on other options."""
    return Annotated[kind | None, typer.Option(flag, help=help, show_default=default, rich_help_panel=panel, **more)]


_TASKS, _INNER, _OUTER, _RUN = "Tasks", "Model and inner loop", "Outer loop", "The run"

Algorithm = Annotated[
    AlgorithmName | None, typer.Argument(help="What to train.", show_default="of --config or of the run resumed")
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", is_eager=True, callback=_read_config, show_default=False, rich_help_panel=_RUN,
        help="Options from a TOML file, by their names; those given here are taken before it.",
    ),
]  # fmt: skip
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", rich_help_panel=_INNER, callback=_after_the_file,
        help="An argument of the algorithm's own class, such as full_context=true; may be given often.",
    ),
]  # fmt: skip
Data = _option(
    _TASKS, str, "--data",
    "sinusoid (regression), glyphs (drawn here) or omniglot; or your own: folder:PATH or zip:PATH of images as "
    "class/image.png, npz:, npy: or safetensors:FILE, csv: or parquet:FILE?label=COLUMN. More options after the ?.",
    "needed", metavar="DATA",
)  # fmt: skip
ImageSize = _option(_TASKS, int, "--image-size", "Of folder: and zip:, the side of the images.", "84", min=1)
Grey = _option(_TASKS, bool, "--grey/--rgb", "Of folder: and zip:, one channel or three.", "rgb")
OnError = _option(
    _TASKS, OnErrorName, "--on-error", "Of folder: and zip:, refuse images that cannot be read, or skip them.", "refuse"
)
Rotations = _option(
    _TASKS, bool, "--rotations/--no-rotations", "Every rotation of a class of images by 90 degrees is a class.",
    "omniglot and glyphs yes, own data no",
)  # fmt: skip
Ways = _option(_TASKS, int, "--ways", "N, classes per task; a support set is [T, N * shots, ...].", "5", min=1)
Shots = _option(_TASKS, int, "--shots", "Support examples per class.", "1; sinusoid 10", min=1)
QueryShots = _option(
    _TASKS, int, "--query-shots", "Query examples per class; a query set is [T, N * query_shots, ...].",
    "15; sinusoid 10", min=1,
)  # fmt: skip
TrainWays = _option(
    _TASKS, int, "--train-ways", "Classes per training task; protonet learns more from more.",
    "protonet 60, else --ways", min=1,
)  # fmt: skip
TrainShots = _option(_TASKS, int, "--train-shots", "Support examples per class in training.", "--shots", min=1)
TrainQueryShots = _option(
    _TASKS, int, "--train-query-shots", "Query examples per class in training.", "5; sinusoid --query-shots", min=1
)
Partition = _option(
    _TASKS, PartitionName, "--partition", "Omniglot's classes: as Vinyals et al., or 1,200 characters to train on.",
    "vinyals",
)  # fmt: skip
Labels = _option(
    _TASKS, LabelsName, "--labels",
    "Classes of training tasks: the true ones, augmentations of images, or clusters; validation has true ones.",
    "true; contrastive augment",
)  # fmt: skip
Augment = Annotated[
    list[str] | None,
    typer.Option(
        "--augment", metavar="NAME=VALUE", rich_help_panel=_TASKS, callback=_after_the_file,
        help="Of --labels augment: rotate, scale, shift, shear, crop, elastic, thicken or drop; may be given often.",
    ),
]  # fmt: skip
AugmentSupport = _option(
    _TASKS, bool, "--augment-support/--plain-support", "Of --labels augment: augment the support images too.",
    "plain; contrastive augmented",
)  # fmt: skip
ClusterCheckpoint = _option(
    _TASKS, Path, "--cluster-checkpoint", "Of --labels cluster: whose encoder sees the images.", "none: pixels",
    metavar="PATH",
)  # fmt: skip
Clusters = _option(_TASKS, int, "--clusters", "Of --labels cluster: k.", "500", min=1)
ClusterPartitions = _option(
    _TASKS, int, "--cluster-partitions", "Of --labels cluster: how many times to cluster.", "1", min=1
)
DataRoot = _option(
    _TASKS, Path, "--data-root", "Folder with real data.", "FASTMETA_DATA, else a download", metavar="DIR"
)

Model = _option(
    _INNER, ModelName, "--model",
    "mlp on flattened inputs [B, D], conv4 on images [B, C, H, W], or none: nothing before the head.", "images conv4",
)
Hidden = _option(
    _INNER, str, "--hidden", "Hidden widths of the mlp, or channels of conv4.",
    "sinusoid 40,40; images 256,128,64,64; conv4 64", metavar="N[,N...]",
)  # fmt: skip
Norm = _option(_INNER, NormName, "--norm", "Of the mlp's hidden layers; batch: of a task's rows in MAML.", "none")
Encoder = _option(
    _INNER, Path, "--encoder", "safetensors file or checkpoint whose weights the backbone starts from.",
    "none: new weights", metavar="FILE",
)  # fmt: skip
FreezeEncoder = _option(
    _INNER, bool, "--freeze-encoder/--fine-tune", "Of --encoder: whether the weights stay as they are.", "fine-tune"
)
Metric = _option(_INNER, MetricName, "--metric", "Distance of protonet, [T, Q, D] to [T, N, D].", "sqeuclidean")
InnerLR = _option(
    _INNER, float, "--inner-lr", "Step size of adaptation.", "sinusoid 0.01; images 0.4, above 5 ways 0.1"
)
InnerSteps = _option(
    _INNER, int, "--inner-steps", "K, gradient steps on the support set in training.",
    "1; images above 5 ways 5", min=0,
)  # fmt: skip
EvalInnerSteps = _option(
    _INNER, int, "--eval-inner-steps", "The same in validation.", "as in training; images at least 3", min=0
)
FirstOrder = _option(
    _INNER, bool, "--first-order/--second-order", "Drop second derivatives (first-order MAML).", "second order"
)
Engine = _option(_INNER, str, "--engine", "What runs the inner loops.", "auto: the fastest that serves")
Autocast = _option(_INNER, AutocastName, "--autocast", "Compute the meta-gradient in this precision.", "as weights are")
Compile = _option(_INNER, bool, "--compile/--no-compile", "Call the algorithm through torch.compile.", "no")
Prefetch = _option(
    _INNER, bool, "--prefetch/--no-prefetch", "Draw the next tasks while these are trained on.",
    "where rows are not on the device",
)  # fmt: skip
Capture = _option(_INNER, bool, "--capture/--no-capture", "Replay a step's gradient as one CUDA graph.", "no")
TaskChunk = _option(
    _INNER, str, "--task-chunk", "Tasks at a time, to bound memory, or auto: as memory has room for; same gradient.",
    "all", metavar="N|auto", callback=_number_or_auto,
)  # fmt: skip

OuterLR = _option(_OUTER, float, "--outer-lr", "Adam's step size.", "0.001")
Schedule = _option(
    _OUTER, ScheduleName, "--lr-schedule", "Of the outer rate; cosine falls to 0 at --iterations.",
    "protonet halve, else constant",
)  # fmt: skip
HalveEvery = _option(
    _OUTER, int, "--lr-halve-every", "Halve the outer rate every so many steps; 0: never.", "protonet 2000", min=0
)
TaskBatchSize = _option(
    _OUTER, int, "--task-batch", "T, tasks per step.", "sinusoid 100; images 32, above 5 ways 16; protonet 1", min=1
)
Iterations = _option(
    _OUTER, int, "--iterations", "Steps until the end.", "20000; maml on images 60000; none with --minutes", min=1
)
Minutes = _option(_OUTER, float, "--minutes", "Minutes of training; with --iterations, whichever ends first.")

Seed = _option(_RUN, int, "--seed", "Of the weights and of the tasks drawn.", "0")
Device = _option(_RUN, str, "--device", "auto, cpu, cuda or cuda:N.", "auto: a GPU if there is one")
Threads = _option(_RUN, int, "--threads", "CPU threads.", "all cores", min=1)
RunFolder = _option(
    _RUN, Path, "--out", "The run's folder, for checkpoints.", "runs/ALGORITHM-DATA-TIME", metavar="DIR"
)
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", rich_help_panel=_RUN,
        help="Go on with the run in --out, bit for bit on one device. Its settings hold; options may be left out. "
        "--data says where own data are now, if they have moved.",
    ),
]  # fmt: skip
FallBack = Annotated[
    bool,
    typer.Option(
        "--fall-back", rich_help_panel=_RUN,
        help="With --resume: if the newest checkpoint is damaged or does not fit, take the newest that does.",
    ),
]  # fmt: skip
EvalEvery = _option(_RUN, int, "--eval-every", "Validate every so many steps; 0: never.", "500; sinusoid 1000", min=0)
EvalTasks = _option(_RUN, int, "--eval-tasks", "Tasks of a validation.", "600", min=2)
TestTasks = _option(
    _RUN, int, "--test-tasks", "Judge the best checkpoint on so many test tasks at the end.", "none", min=2
)
SaveEvery = _option(
    _RUN, int, "--save-every", "Checkpoint every so many steps, beside those at a new best and at the end.",
    "--eval-every", min=0,
)  # fmt: skip
SkipNonFinite = _option(
    _RUN, bool, "--skip-non-finite/--stop-non-finite", "Of steps whose loss or gradient is not finite.", "stop"
)
TensorBoard = Annotated[
    bool,
    typer.Option("--tensorboard/--no-tensorboard", rich_help_panel=_RUN, help="Write TensorBoard scalars to --out."),
]
Report = Annotated[
    bool, typer.Option("--report/--no-report", rich_help_panel=_RUN, help="Write report.html to --out at the end.")
]
Debug = Annotated[bool, typer.Option("--debug", callback=_set_debug, help="Show the traceback of an error.")]

ReportRun = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, into which report.html goes.")]
ReportTasks = Annotated[int, typer.Option("--tasks", min=2, help="Held-out tasks to judge.")]

Checkpoint = Annotated[
    Path, typer.Argument(help="A run's folder, of which the best checkpoint is taken, or one checkpoint's file.")
]
Episodes = Annotated[int, typer.Option(min=2, help="Held-out tasks; the interval is 1.96 s / sqrt(episodes).")]
SuiteEpisodes = _option(
    None, int, "--episodes", "Held-out tasks; the interval is 1.96 s / sqrt(episodes).", "600; cross-domain: 200", min=2
)
Split = Annotated[SplitName, typer.Option(help="Of which classes; sinusoids have one distribution.")]
TestWays = _option(None, int, "--ways", "Classes per task.", "as validated; maml cannot change it", min=1)
TestShots = _option(None, int, "--shots", "Support examples per class.", "as validated", min=1)
TestQueryShots = _option(None, int, "--query-shots", "Query examples per class.", "as validated", min=1)
TestInnerSteps = _option(
    None, int, "--inner-steps", "Steps of adaptation.", "as validated; regression 10, each shown", min=0
)
RunData = _option(
    None, str, "--data", "Own data in place of the run's: where they are now, with what options differ.", "the run's",
    metavar="FORM:PATH",
)  # fmt: skip
Newest = Annotated[bool, typer.Option("--newest", help="Of a folder, the newest checkpoint instead of the best.")]
TestSeed = Annotated[int, typer.Option("--seed", help="Of the tasks.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]

Suite = Annotated[
    str,
    typer.Option(
        "--suite",
        help="quick: 90 minutes on two CPU cores; paper: the papers' lengths; smoke: seconds; cross-domain: an hour, "
        "from some real data sets to others.",
    ),
]
ReproduceFolder = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the runs and the table go.")]
Only = Annotated[list[str] | None, typer.Option("--only", metavar="ROW", help="Run this row; may be given often.")]

Run = Annotated[
    str,
    typer.Argument(
        help="A run's folder or checkpoint, or a rule without training: nearest-mean, nearest, ridge, in-context."
    ),
]
Support = Annotated[
    Path,
    typer.Option(
        "--support", metavar="PATH",
        help="What is known: a folder or .zip of class/picture, or a table (.csv, .parquet) with a column that tells.",
    ),
]  # fmt: skip
Query = Annotated[
    Path, typer.Option("--query", metavar="PATH", help="What is asked: a folder or .zip of pictures, or a table.")
]
Predictions = _option(
    None, Path, "--out", "CSV file for the predictions.", "needed without --json", metavar="FILE"
)
Calibrate = Annotated[
    bool, typer.Option("--calibrate", help="Fit the probabilities to support rows predicted from the others.")
]
Force = Annotated[bool, typer.Option("--force", help="Write over a file that is there.")]
Damaged = Annotated[OnErrorName, typer.Option("--on-error", help="Of pictures that cannot be read.")]
RuleImageSize = _option(None, int, "--image-size", "Side of the pictures, for a rule.", "84; a run has its own", min=1)
RuleGrey = _option(None, bool, "--grey/--rgb", "Channels of the pictures, for a rule.", "rgb; a run has its own")
Label = _option(None, str, "--label", "Column of the classes in a table, for a rule.", "a run has its own")
Target = Annotated[
    list[str] | None,
    typer.Option("--target", help="Column of numbers to predict in a table, for ridge; may be given often."),
]
EncoderSource = Annotated[
    Path, typer.Argument(help="A run's folder or checkpoint, or a safetensors file with the weights of a conv4 or mlp.")
]
EmbedData = Annotated[
    str, typer.Option("--data", help="glyphs, omniglot, or own data, such as folder:photos; as of train.")
]
FeaturesFile = Annotated[
    Path, typer.Option("--out", metavar="FILE", help="safetensors file for features; beside it a .csv of the splits.")
]

World = Annotated[WorldName, typer.Argument(help="The distribution of tasks.")]
IrlIterations = Annotated[int, typer.Option("--iterations", min=1, help="Outer steps.")]
IrlTasks = Annotated[int, typer.Option("--tasks", min=2, help="New tasks that each line is judged on.")]
IrlSeed = Annotated[int, typer.Option("--seed", help="Of the weights and of the tasks drawn.")]

BenchGroup = Annotated[
    list[str] | None,
    typer.Option(
        "--group", metavar="GROUP", show_default="all",
        help="Workloads of this group alone, such as maml or maml_conv; may be given often. A wrong one lists them.",
    ),
]  # fmt: skip
Against = Annotated[
    list[str] | None,
    typer.Option(
        "--against", metavar="NAME", show_default="everybody",
        help="Contenders with this in their names alone, such as torch.func or JAX; may be given often.",
    ),
]  # fmt: skip
BenchDtype = Annotated[str, typer.Option("--dtype", help="float32, float64 or bfloat16.")]
BenchSeconds = _option(None, float, "--seconds", "Time for each workload.", "2; --quick 0.25", min=0.0)
BenchQuick = Annotated[
    bool, typer.Option("--quick", help="Under five minutes: short rounds, no large workloads, nobody who compiles.")
]
BenchFolder = _option(
    None, Path, "--out", "Folder for results.json, report.md and pictures.", "nothing is written", metavar="DIR"
)
Before = _option(
    None, Path, "--compare", "results.json of an earlier run; code 1 if a row is slower than its spread explains.",
    "none", metavar="FILE",
)  # fmt: skip

Reset = Annotated[bool, typer.Option("--reset", help="Take away what was measured: the built-in choices hold again.")]
TuneSeconds = Annotated[float, typer.Option("--seconds", min=0.0, help="Time for each size of each choice.")]

DemoFolder = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the picture goes.")]
Quick = Annotated[bool, typer.Option("--quick", hidden=True, help="A few seconds, to see that it runs.")]
