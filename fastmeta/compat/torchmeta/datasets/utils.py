"""`get_asset`, which programs import beside the data sets. The lists of classes that torchmeta ships are not here."""

from __future__ import annotations

import json
from pathlib import Path

from fastmeta.compat._absent import not_here

__getattr__ = not_here(__name__, "torchmeta 1.8.0", ["download_file_from_google_drive"])


def get_asset_path(*args: str) -> str:
    """Where the file would be."""
    return str(Path(__file__).parent.joinpath("assets", *args))


def get_asset(*args: str, dtype: str | None = None):
    """What the JSON file says.

    Raises:
        IOError: it is not here.
        NotImplementedError: another `dtype` than "json", by default the file's suffix.
    """
    path = Path(get_asset_path(*args))
    if not path.is_file():
        raise OSError(f"{path} not found: the lists of classes of torchmeta 1.8.0 are not here")
    if (path.suffix[1:] if dtype is None else dtype) != "json":
        raise NotImplementedError(f"{path} is no JSON file")
    return json.loads(path.read_text())
