"""Arrays as a store of examples: in memory, or from .npz, .npy and safetensors files. Pickles are never loaded."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmeta import values
from fastmeta.tasks.examples import Examples
from fastmeta.tasks.read._archive import open_archive
from fastmeta.tasks.read._rows import labels_of, rows_of, tensor_of

ROWS, LABELS = ("images", "x", "features"), ("labels", "y")
SUFFIXES = (".npz", ".npy", ".safetensors")
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".joblib", ".ckpt")


def arrays(
    rows: Tensor | np.ndarray | Sequence,
    labels: Tensor | np.ndarray | Sequence[Hashable] | None = None,
    *,
    names: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    name: str = "arrays",
) -> Examples:
    """Examples from a tensor or array: images, feature vectors, sequences, token ids.

    What is not copied stays where it is. uint8 rows are images: `[H, W, C]` with 1, 3 or 4 channels last become
    `[C, H, W]`, and `[H, W]` become `[1, H, W]`. Other rows keep their shape and dtype, but for those that torch cannot
    compute with: booleans become float32, unsigned integers the next larger signed ones; numbers `[R]` become `[R, 1]`.

    Args:
        rows: `[R, ...]` with labels, else `[classes, instances, ...]`.
        labels: the class of each row, `R` integers or texts.
        names, groups, name: as of `Examples`.

    Raises:
        TypeError, ValueError: what is no array of numbers, labels of another number, NaN or infinities, by row.
    """
    rows = tensor_of("rows", rows)
    if labels is None:
        if rows.dim() < 3:
            raise ValueError(f"rows without labels must be [classes, instances, ...], got {list(rows.shape)}")
        labels = torch.arange(len(rows)).repeat_interleave(rows.shape[1])
        rows = rows.flatten(0, 1)
    if isinstance(labels, np.ndarray):
        labels = labels_of("labels", labels)
    return Examples(rows_of(rows, name), labels, names=names, groups=groups, name=name)


def array_file(path: str | os.PathLike, labels: str | os.PathLike | None = None) -> Examples:
    """Examples from a file of arrays.

    Args:
        path: what `Examples.save` wrote; or `.npz` or `.safetensors`, with rows as `images`, `x` or `features`, and
            their labels as `labels` or `y`; without labels rows are `[classes, instances, ...]`. Texts `names` and
            `groups` of the classes may be there. Or `.npy`, rows alone. `.npy` and `.safetensors` are mapped into
            memory, not read.
        labels: a `.npy` file with the label of each row, of a `.npy` file.

    Raises:
        ValueError: another kind of file, above all a pickle; one that is damaged, holds Python objects, or lacks an
            array, by name; rows as `arrays` refuses them.
    """
    values.path("path", path)
    values.path("labels", labels, or_none=True)
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        raise ValueError(
            f"{path}: {suffix} files are pickles, which can run any code when loaded, and are never read here: write"
            " .safetensors (safetensors.torch.save_file) or .npz (numpy.savez)"
        )
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: files of arrays end in {', '.join(SUFFIXES)}")
    if labels is not None and suffix != ".npy":
        raise ValueError(f"labels of a {suffix} file lie in it; {labels} is for .npy")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if suffix == ".npy":
        given = None if labels is None else labels_of(str(labels), _npy(Path(labels)))
        return _named(path, lambda: arrays(_npy(path), given, name=path.stem))
    if suffix == ".safetensors" and _is_of_examples(path):
        return Examples.load(path)
    found = _npz(path) if suffix == ".npz" else _safetensors(path)
    rows, label = _one_of(path, found, ROWS), _one_of(path, found, LABELS, needed=False)
    about = {key: [str(one) for one in found[key]] for key in ("names", "groups") if key in found}
    return _named(path, lambda: arrays(rows, label, name=path.stem, **about))


def _named(path: Path, make):
    try:
        return make()
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error


def _npz(path: Path) -> dict[str, np.ndarray]:
    with open_archive(path, largest=None):
        pass  # no zip, encrypted, or by another method
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: _array(path, file, name) for name in file.files if name in _KEYS}
    except (OSError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _array(path: Path, file: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    import zipfile
    import zlib

    try:
        return file[name]
    except MemoryError as error:
        raise ValueError(f"{path}: {name!r} is too large for the memory: {error}") from error
    except (ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(_why(path, error, name)) from error


def _npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="c", allow_pickle=False)  # copied where it is written to: torch may write
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(_why(path, error)) from error


def _why(path: Path, error: Exception, name: str | None = None) -> str:
    what = f"{path}: {name!r}" if name else f"{path}"
    if "allow_pickle" in str(error) or "Python objects" in str(error):
        return f"{what} holds Python objects, which are pickles and never loaded: save numbers, or text as astype(str)"
    return f"{what} is damaged, or no file of arrays: {error}"


def _is_of_examples(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return "fastmeta.examples" in (file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name in _KEYS}


_KEYS = (*ROWS, *LABELS, "names", "groups")


def _one_of(path: Path, found: Mapping[str, Any], keys: Sequence[str], needed: bool = True) -> Any:
    there = [key for key in keys if key in found]
    if len(there) > 1:
        raise ValueError(f"{path} holds {' and '.join(there)}, which mean the same: leave one")
    if not there and needed:
        raise ValueError(f"{path} holds none of {', '.join(keys)}")
    return found[there[0]] if there else None
