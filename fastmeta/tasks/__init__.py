"""Where tasks come from: samplers that live on the training device and draw whole task batches at once."""

from __future__ import annotations

from os import PathLike

from torch import Tensor

from fastmeta import values
from fastmeta.batch import TaskBatch
from fastmeta.tasks._arguments import check_sizes
from fastmeta.tasks.augment import Augmentation
from fastmeta.tasks.clinc import clinc, tf_idf
from fastmeta.tasks.episodes import EpisodeSampler
from fastmeta.tasks.examples import Examples
from fastmeta.tasks.glyphs import glyphs
from fastmeta.tasks.inputs import Inputs
from fastmeta.tasks.mixed import MixedTasks
from fastmeta.tasks.omniglot import PARTITIONS, omniglot
from fastmeta.tasks.person_tasks import PersonTasks
from fastmeta.tasks.placement import episodes_of, placed
from fastmeta.tasks.prefetch import Prefetched
from fastmeta.tasks.read import Data, DataWarning, is_form, open_data, split_examples
from fastmeta.tasks.read.tasks import tasks_of
from fastmeta.tasks.regression_tasks import RegressionTasks
from fastmeta.tasks.sinusoid import SinusoidTasks
from fastmeta.tasks.source import TaskSource
from fastmeta.tasks.task_rows import TaskRows
from fastmeta.tasks.unlabelled import AugmentedTasks, ClusterTasks, embed_images, kmeans_partitions
from fastmeta.tasks.wisdm import wisdm

__all__ = [
    "NAMES",
    "SPLITS",
    "AugmentedTasks",
    "Augmentation",
    "ClusterTasks",
    "Data",
    "DataWarning",
    "EpisodeSampler",
    "Examples",
    "Inputs",
    "MixedTasks",
    "PersonTasks",
    "Prefetched",
    "RegressionTasks",
    "SinusoidTasks",
    "TaskBatch",
    "TaskRows",
    "TaskSource",
    "clinc",
    "embed_images",
    "episodes_of",
    "glyphs",
    "kmeans_partitions",
    "load_images",
    "make_tasks",
    "omniglot",
    "placed",
    "open_data",
    "split_examples",
    "tf_idf",
    "wisdm",
]

NAMES = ("sinusoid", "glyphs", "omniglot")
SPLITS = ("train", "val", "test")


def make_tasks(
    name: str | Data,
    split: str = "train",
    *,
    ways: int | None = None,
    shots: int | None = None,
    query_shots: int | None = None,
    device: str = "cpu",
    data_root: str | PathLike | None = None,
    seed: int = 0,
    partition: str = "vinyals",
    rotations: bool | None = None,
):
    """A source of tasks by name, or from data of your own.

    Args:
        name: "sinusoid" (regression), "glyphs" (drawn here, no network) or "omniglot" (real); or own data, a line as
            `open_data` takes it, such as "folder:photos", or what that returned.
        split: "train", "val" or "test"; their classes are disjoint. Sinusoids have no splits: all are one distribution.
        ways: N, classes per task, 5 by default; of a person's, 3. Not for regression.
        shots: support examples per class, 1 by default; of regression, 10.
        query_shots: query examples per class, 15 by default; of a person's, 5; of regression, 10.
        device: where the data lies and the tasks are drawn.
        data_root: folder of real data; see `omniglot`.
        seed: of the glyphs' classes.
        partition: of Omniglot's characters, "vinyals" or "1200".
        rotations: whether every rotation of a class of images is a class; default of own data no, else yes.

    Own data of classes that have fewer than `shots + query_shots` rows are left out, with a warning.

    Returns:
        An object with `sample(num_tasks, generator=None) -> TaskBatch`, `kind`, `input_shape` and `output_size`.

    Raises:
        TypeError, ValueError: an unknown name, split or partition, a number or device that is none; more ways, shots or
            query shots than the data has.
    """
    if not isinstance(name, Data) and not (isinstance(name, str) and is_form(name)):
        values.choice("name", name, NAMES)
    values.choice("split", split, SPLITS)
    values.choice("partition", partition, PARTITIONS)
    if rotations is not None:
        values.flag("rotations", rotations)
    sizes = {"ways": ways, "shots": shots, "query_shots": query_shots}
    check_sizes(**{key: size for key, size in sizes.items() if size is not None})
    device = values.device("device", device)
    values.seed("seed", seed)
    values.path("data_root", data_root, or_none=True)
    if name not in NAMES:
        data = open_data(name) if isinstance(name, str) else name
        return tasks_of(data, split, device, rotations=bool(rotations), **sizes)
    if name == "sinusoid":
        return SinusoidTasks(shots=_or(shots, 10), query_shots=_or(query_shots, 10), device=device)
    images = load_images(name, split, data_root=data_root, seed=seed, partition=partition)
    return EpisodeSampler(
        images.to(device),
        ways=_or(ways, 5),
        shots=_or(shots, 1),
        query_shots=_or(query_shots, 15),
        rotations=rotations is not False,
        name=f"{name}/{split}",
    )


def load_images(
    name: str | Data,
    split: str = "train",
    *,
    data_root: str | PathLike | None = None,
    seed: int = 0,
    partition: str = "vinyals",
) -> Tensor:
    """The images of a split by name, uint8 `[classes, instances, C, H, W]`, without rotations; of own data `[R, C, H,
    W]`. Arguments and errors as of `make_tasks`, but a name must be one of images."""
    if isinstance(name, Data):
        part = name.part(split)
        if len(part.input_shape) != 3:
            raise ValueError(f"{part.name} must be images [C, H, W], and its rows are {list(part.input_shape)}")
        return part.rows[part.order]
    values.choice("name", name, NAMES[1:])
    values.choice("split", split, SPLITS)
    values.choice("partition", partition, PARTITIONS)
    if name == "glyphs":
        return glyphs(split, seed)
    return omniglot(split, partition, data_root)


def _or(value, default):
    return default if value is None else value
