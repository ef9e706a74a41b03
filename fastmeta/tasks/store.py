"""Examples in a file: safetensors, rows class by class, so that a class is one run of the disk.

The file holds `offsets` int64 `[C + 1]` and `rows` `[R, ...]`, and as metadata the JSON of the names. It is written
part by part, and mapped when it is read: the whole of it need not fit into memory either way.
"""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmeta import values

_FORMAT = "1"
_DTYPES = {
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "BOOL": torch.bool,
}  # fmt: skip
_AT_ONCE = 1 << 24  # bytes of rows
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's value; named by Python from 3.13 on


def save(path: str | os.PathLike, rows: Tensor, order: Tensor, offsets: Tensor, **named: Any) -> None:
    """Write `rows[order]`, `offsets`, and what is named, which must be JSON; see `Examples.save`."""
    path = Path(values.path("path", path))
    kind = {dtype: code for code, dtype in _DTYPES.items()}.get(rows.dtype)
    if kind is None:
        raise TypeError(f"rows must be of a real dtype to be saved, got {values.dtype_of(rows)}")
    shape, row_bytes = [len(order), *rows.shape[1:]], rows[:1].nbytes
    begin = offsets.nbytes
    header: dict[str, Any] = {
        "__metadata__": {"fastmeta.examples": _FORMAT, "names": json.dumps(named)},
        "offsets": {"dtype": "I64", "shape": [len(offsets)], "data_offsets": [0, begin]},
        "rows": {"dtype": kind, "shape": shape, "data_offsets": [begin, begin + shape[0] * row_bytes]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that what is mapped begins at a multiple of 8
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.write(_bytes(offsets))
            for part in order.to(rows.device).split(max(1, _AT_ONCE // max(1, row_bytes))):
                file.write(_bytes(rows[part]))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a disk that is full does not say what was being written
        raise type(error)(error.errno, f"cannot be written: {error.strerror}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must reach the disk
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: str | os.PathLike) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Rows in the order of classes, mapped; offsets; and what was named: `name`, `names` and `groups` at least."""
    from safetensors import SafetensorError, safe_open

    path = Path(values.path("path", path))
    try:
        with safe_open(path, framework="np") as file:  # checks that header and length of the file agree
            metadata = file.metadata() or {}
        if metadata.get("fastmeta.examples") != _FORMAT:
            raise ValueError(f"{path} holds no examples that this version can read")
        tensors = mapped(path)
        named = json.loads(metadata["names"])
        rows, offsets = tensors["rows"], tensors["offsets"]
        names, groups, _ = tuple(named["names"]), named["groups"], named["name"]
        whole = len(names) + 1 == len(offsets) and (groups is None or len(groups) == len(names))
        if not whole or offsets[0] != 0 or offsets[-1] != len(rows) or not (offsets.diff() > 0).all():
            raise ValueError(f"{path} is damaged: its rows, offsets and names do not fit each other")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
    except (KeyError, TypeError, AttributeError, RuntimeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    return rows, offsets, named


def mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, as views of one map of it; numbers at multiples of their size, and metadata.

    `safe_open` maps too, but for PyTorch in a way that asks the system to set the whole size aside, which it refuses
    for a file larger than its memory. Pages that are written to, if ever, are copied, and the file stays as it is.
    """
    with open(path, "rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(begin - 8))
        flags, allowed = mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        whole = torch.frombuffer(mmap.mmap(file.fileno(), 0, flags, allowed), dtype=torch.uint8)
    del header["__metadata__"]
    return {
        name: whole[slice(*(begin + place for place in entry["data_offsets"]))]
        .view(_DTYPES[entry["dtype"]])
        .view(entry["shape"])
        for name, entry in header.items()
    }


def _bytes(tensor: Tensor):
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
