"""Tensors that took long to make, kept as checked files in a cache folder."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from fastmeta._cache import named_folder
from fastmeta.tasks.read._warning import DataWarning
from fastmeta.tasks.store import mapped

Made = tuple[dict[str, Tensor], dict[str, str]]  # tensors and texts, each by name
_DAY = 24 * 60 * 60  # seconds
_DTYPES = {"torch.uint8": "U8", "torch.int64": "I64"}


def cache_folder() -> Path:
    """The folder that FASTMETA_CACHE names, else the user's own for fastmeta; where that cannot be, one for as long as
    this process lasts."""
    folder = named_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except OSError as error:  # read-only home
        return _instead(str(folder), error.strerror)


@functools.cache
def _instead(folder: str, why: str) -> Path:
    instead = Path(tempfile.mkdtemp(prefix="fastmeta-"))
    atexit.register(shutil.rmtree, instead, ignore_errors=True)
    _tell(f"the cache {folder} cannot be made ({why}): next time all is read anew")
    return instead


@functools.cache
def _tell(what: str) -> None:
    """Once, not for every split."""
    warnings.warn(what, DataWarning, stacklevel=4)


def cached(name: str, format: str, make: Callable[[], Made]) -> Made:
    """What `make` gives: from the cache's file `name` if it is whole and of this `format`, else made and put there.

    Tensors uint8 or int64; those of a file are mapped, not read.
    """
    path = cache_folder() / f"{name}.safetensors"
    found = _read(path, format)
    if found is not None:
        return found
    tensors, texts = make()
    try:
        _write(path, tensors, texts | {"format": format, "sha256": _sum(tensors)})
    except OSError as error:
        _tell(f"the cache {path.parent} cannot be written ({error.strerror}): next time all is read anew")
        return tensors, texts
    return _read(path, format, check=False) or (tensors, texts)


def _sum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().numpy().reshape(-1))
    return digest.hexdigest()


def _read(path: Path, format: str, check: bool = True) -> Made | None:
    from safetensors import SafetensorError, safe_open

    try:
        if not path.is_file():
            return None
        with safe_open(path, "np") as file:  # checks that header and length of the file agree
            texts = file.metadata() or {}
        if texts.get("format") != format:
            return None
        tensors = mapped(path)
    except (SafetensorError, OSError):
        return None  # damaged: to be made anew
    return (tensors, texts) if not check or texts.get("sha256") == _sum(tensors) else None


def _sweep(folder: Path) -> None:
    """Let go of what processes that were killed left half-written."""
    for partial in folder.glob("*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > _DAY:  # else another process may be writing it
                partial.unlink()


def _write(path: Path, tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
    """A safetensors file, whole or not at all. The library's own writer copies all tensors first: these may be larger
    than the memory."""
    # numbers of eight bytes first, and so at multiples of eight
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    header, start = {"__metadata__": texts}, 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[str(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    _sweep(path.parent)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for tensor in tensors.values():
                file.write(tensor.contiguous().numpy().reshape(-1))
        os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
