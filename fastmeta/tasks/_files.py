"""Where real data lies."""

from __future__ import annotations

import os
from pathlib import Path


def folder_of(file: str, name: str, sub: str, data_root: str | os.PathLike | None) -> Path:
    """The folder that holds `file` of the data set `name`: `data_root`, or `sub` in it; without it the folder that
    FASTMETA_DATA names. ValueError if it is not there."""
    root = data_root or os.environ.get("FASTMETA_DATA")
    if root is None:
        raise ValueError(f"{name} is not downloaded: name the folder of {file} by data_root or FASTMETA_DATA")
    for folder in (Path(root), Path(root) / sub):
        if (folder / file).is_file():
            return folder
    raise ValueError(f"no {name} in {root}: {file} must lie there or in {Path(root) / sub}")
