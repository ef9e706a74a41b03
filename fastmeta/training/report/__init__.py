"""`report.html` in a run's folder: how the run went and what it predicts, one file that refers to no other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...tasks import NAMES, EpisodeSampler
from ..checkpoint import CheckpointFolder, write_whole
from ..log import read_log
from ..run import config_of, find_checkpoint, load_for_evaluation
from .page import page
from .predictions import predict_tasks

if TYPE_CHECKING:
    from ...tasks import Data

FILE = "report.html"


def write_report(
    folder: str | Path,
    *,
    tasks: int = 100,
    device: str = "auto",
    threads: int | None = None,
    data_root: str | Path | None = None,
    data: str | None = None,
    opened: Data | None = None,
) -> Path:
    """Write `folder/report.html` about the run in `folder`, and return its path.

    Args: tasks: held-out ones of the split "test", on which the best checkpoint is judged and from which the examples
        are. device, threads, data_root, data, opened: what these are judged with, as of `load_for_evaluation`. Where
        their data cannot be had, the page says why and shows the rest.

    Raises CheckpointError where the folder holds no checkpoint that can be read; OSError where it cannot be written.
    """
    folder = Path(folder)
    best, newest = find_checkpoint(folder), CheckpointFolder(folder).newest(fall_back=True)[0]
    path = folder / FILE
    parameters = sum(tensor.numel() for tensor in best.group("model").values())
    try:
        config, algorithm, source = load_for_evaluation(
            best, "test", device=device, threads=threads, data_root=data_root, data=data, opened=opened
        )
        parameters = sum(parameter.numel() for parameter in algorithm.parameters())
        steps = config.eval_inner_steps if hasattr(algorithm, "inner_steps") else None
        named = config.data not in NAMES and isinstance(source, EpisodeSampler)
        found = predict_tasks(algorithm, source, episodes=tasks, inner_steps=steps, named=named)
    except (ValueError, TypeError, OSError, ImportError) as error:
        found = str(error)
    text = page(folder, config_of(best), best, newest, read_log(folder), found, parameters)
    write_whole(path, text.encode())
    return path
