"""The folder for what fastmeta keeps between processes and can make again."""

from __future__ import annotations

import os
from pathlib import Path


def named_folder() -> Path:
    """The one that FASTMETA_CACHE names, else the user's own for fastmeta; it need not be there."""
    folder = os.environ.get("FASTMETA_CACHE")
    if folder is None:
        import pooch

        folder = pooch.os_cache("fastmeta")
    return Path(folder)
