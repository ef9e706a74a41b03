"""A run's own data, opened again: where they were or where they are now, with the standardisation of the run."""

from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path

from ..tasks import Data, DataWarning, Inputs, open_data
from ..tasks.read import Features, is_form, moved, parse
from .checkpoint import Checkpoint
from .config import RunConfig


def relocated(config: RunConfig, data: str | None) -> RunConfig:
    """`config` with its own data at another place: `data` is a line such as `folder:PATH`, and keeps the options of the
    run's that it does not give itself. None: as it is.

    Raises:
        ValueError: a run on data of fastmeta's own, or a line that is none of own data.
    """
    if data is None or data == config.data:
        return config
    if not is_form(config.data) or not is_form(data):
        raise ValueError(f"data says where a run's own data are now: this run's are {config.data!r}, got {data!r}")
    return dataclasses.replace(config, data=moved(config.data, data))


def reopened(
    checkpoint: Checkpoint, config: RunConfig, *, same: bool = False, progress: bool = False
) -> Data | None:
    """The own data of `config` (None of others), which is that of `checkpoint` or `relocated`: a table's columns become
    numbers as they did in the run, whatever the file holds now.

    Args:
        same: refuse data with other classes (or tasks), or other numbers of rows, than those that the run began with;
            else they are told in a `DataWarning`.
        progress: as of `open_data`.

    Raises:
        ValueError: data that are not there, or that the run does not read: rows of another shape, other columns.
    """
    if not is_form(config.data):
        return None
    path = Path(parse(config.data).path).expanduser()
    if not path.exists():
        where = "" if path.is_absolute() else f" in {os.getcwd()}"
        raise ValueError(
            f"the data of {checkpoint.path.parent}, {config.data}, are not there: no {path}{where}; if they have "
            f"moved, --data {parse(config.data).form}:PATH (in Python data=) says where they are"
        )
    known = checkpoint.record.get("inputs")
    inputs = None if known is None else Inputs.from_json(known)
    table = {} if inputs is None or inputs.table is None else inputs.table
    fitted = {
        name: None if table.get(part) is None else Features.from_json(table[part])
        for name, part in (("fitted", "features"), ("fitted_targets", "targets"))
    }
    opened = open_data(config.data, progress=progress, **fitted)
    if inputs is not None and (opened.kind, tuple(opened.input_shape)) != (inputs.kind, inputs.input_shape):
        raise ValueError(
            f"{config.data} is {opened.kind} of rows {list(opened.input_shape)}, and the run is {inputs.kind} of rows "
            f"{list(inputs.input_shape)}"
        )
    before = checkpoint.record.get("classes")
    if before is not None and before != opened.digest():
        told = f"{config.data} has other classes or tasks, or other numbers of rows, than the run began with"
        if same:
            raise ValueError(f"{told}: that would be another run")
        warnings.warn(f"{told}: the run may have been trained on some of those that judge it now", DataWarning, 2)
    return opened
