"""Checkpoints: tensors in safetensors, everything else in JSON, whole or not at all.

A checkpoint is a pair `step-00000100.safetensors` and `step-00000100.json`. The tensors are written first and
the JSON, which holds their checksum, last: each to a temporary name in the same folder, flushed to the disk,
then renamed. A crash at any moment leaves either the whole pair or no JSON, so what carries a JSON was
complete once, and what was damaged since is refused by name.

Each JSON says which run it is of and the how-manieth of that run it is: a run that went back to an earlier step, past
damaged checkpoints, writes the newest ones though their steps are not the largest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import values
from .lock import FolderLock

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})\.json")
# what only the holder of the lock writes
_TEMPORARY = re.compile(r"\.(step-\d{8,}\.(json|safetensors)|log\.jsonl|run\.toml)\.\d+\.tmp")
_WRITTEN_BY = "fastmeta, step "  # in the header of the tensors' file: what has it is ours to remove


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or not for this run; the message names the file and what is
    wrong."""


class Checkpoint(NamedTuple):
    """A checkpoint that was read and found whole. `record` is the JSON, `tensors` are on the CPU."""

    path: Path
    step: int
    record: dict[str, Any]
    tensors: dict[str, Tensor]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors called `prefix/<name>`, by `<name>`."""
        return {name[len(prefix) + 1 :]: t for name, t in self.tensors.items() if name.startswith(prefix + "/")}


class CheckpointFolder:
    """The checkpoints of one run. Keeps the newest `keep` of them, and the best by validation.

    `lock` is what a run holds while it writes there.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder = Path(values.path("folder", folder))
        self.keep = values.count("keep", keep)
        self.lock = FolderLock(self.folder)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, whole or damaged since; in the order of the steps."""
        if not self.folder.is_dir():
            return []
        found = {int(match[1]): entry.name for entry in self.folder.iterdir() if (match := _NAME.fullmatch(entry.name))}
        return sorted(step for step, name in found.items() if name == self.path(step).name)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.json"

    def save(self, step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Path:
        """Write the checkpoint of `step` and drop the ones no longer kept, never this one.

        `record` must be JSON; its key `"score"`, a number where larger is better or None, decides which one
        is best. Files that were not written here stay as they are. Raises OSError, which names the file, where
        one cannot be written: the checkpoints of before are whole.
        """
        from safetensors.torch import save

        self.folder.mkdir(parents=True, exist_ok=True)
        # clone: safetensors refuses tensors that share memory, and tied weights do
        data = save(
            {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()},
            {"written_by": f"{_WRITTEN_BY}{step}"},
        )
        records, path = self._records(), self.path(step)
        tensor_path = self._tensor_path(step, records.get(step))
        if not (tensor_path.exists() and tensor_path.read_bytes() == data):  # else: only the record is new
            path.unlink(missing_ok=True)  # what is about to be replaced is no checkpoint from here on
            write_whole(tensor_path, data)
        newest = max(records.values(), key=_order, default={})
        run = self.lock.run() or newest.get("run") or uuid.uuid4().hex
        body = {
            **record,
            "format": FORMAT,
            "run": run,
            "saves": (newest.get("saves") or 0) + 1,
            "step": step,
            "versions": versions(),
            "tensors": {"file": tensor_path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
        }
        body["sha256"] = _fingerprint(body)
        write_whole(path, (json.dumps(body, indent=1, allow_nan=False) + "\n").encode())
        self.lock.name_run(run)
        self._prune(records | {step: body})
        return path

    def load(self, step: int) -> Checkpoint:
        """The checkpoint of `step`, found whole and of the folder's own run. Raises CheckpointError."""
        checkpoint = load_checkpoint(self.path(step))
        if not self._own(checkpoint.record):
            raise CheckpointError(f"{checkpoint.path}: a checkpoint of another run than the one in this folder")
        return checkpoint

    def newest(
        self, *, fall_back: bool = False, use: Callable[[Checkpoint], Any] = lambda checkpoint: checkpoint
    ) -> tuple[Any, list[CheckpointError]]:
        """What `use` makes of the newest checkpoint, and with `fall_back` the complaints about the damaged
        ones passed over.

        Without `fall_back` a damaged newest checkpoint raises its CheckpointError, as does a folder without
        any. So does one of another run, put here under a name of this one's, and one that `use` raises
        CheckpointError about: what is whole may still not fit.
        """
        complaints: list[CheckpointError] = []
        for step in reversed(self._in_order()):
            try:
                return use(self.load(step)), complaints
            except CheckpointError as error:
                if not fall_back:
                    raise
                complaints.append(error)
        damaged = "".join(f"; {error}" for error in complaints)
        raise CheckpointError(f"{self.folder}: no checkpoint to load{damaged}")

    def best(self) -> Checkpoint:
        """The checkpoint with the best validation score, or the newest where none was validated."""
        best = _best(self._records())  # a damaged one cannot be the best; loading it by name says what is wrong
        return self.load(best) if best is not None else self.newest()[0]

    def _records(self) -> dict[int, dict[str, Any]]:
        """Of the run's own checkpoints whose JSON is whole, by step."""
        records = {}
        for step in self.steps():
            with contextlib.suppress(CheckpointError):
                record = _read_record(self.path(step))
                if self._own(record):
                    records[step] = record
        return records

    def _in_order(self) -> list[int]:
        """All steps in the order they were written in. Of a JSON that is damaged or another run's that is not
        known: its step must tell."""
        records = self._records()
        written = sorted(records, key=lambda step: _order(records[step]))
        last = written[-1] if written else -1
        unknown = [step for step in self.steps() if step not in records]
        return [*(s for s in unknown if s < last), *written, *(s for s in unknown if s > last)]

    def _own(self, record: Mapping[str, Any]) -> bool:
        """False for a record that says it is of another run than the folder."""
        own, found = self.lock.run(), record.get("run")
        return None in (own, found) or own == found

    def _tensor_path(self, step: int, record: Mapping[str, Any] | None) -> Path:
        """Where the tensors of `step` go: over those of a checkpoint of it, never over a file of somebody else's."""
        path = plain = self.path(step).with_suffix(".safetensors")
        number = 1
        while path.exists() and not (_written_here(path) or (record and record["tensors"]["file"] == path.name)):
            number += 1
            path = plain.with_stem(f"{plain.stem}-{number}")
        return path

    def _prune(self, records: Mapping[int, Mapping[str, Any]]) -> None:
        in_order = sorted(records, key=lambda step: _order(records[step]))  # the one just written is the last
        kept = {*in_order[-self.keep :], _best(records)}
        for step in in_order:
            if step not in kept:
                self.path(step).unlink(missing_ok=True)  # the JSON first: tensors alone are no checkpoint
                self.path(step).with_name(records[step]["tensors"]["file"]).unlink(missing_ok=True)
        # What a crash between two files left behind; beside a JSON that is damaged tensors may be whole.
        steps = self.steps()
        needed = {self.path(step).stem for step in steps}
        needed |= {Path(records[step]["tensors"]["file"]).stem for step in steps if step in records}
        for stray in self.folder.glob("step-*.safetensors"):
            if stray.stem not in needed and _written_here(stray):
                stray.unlink(missing_ok=True)
        for stray in self.folder.glob(".*.tmp"):
            if _TEMPORARY.fullmatch(stray.name):
                stray.unlink(missing_ok=True)


def _order(record: Mapping[str, Any]) -> tuple[int, int]:
    return record.get("saves") or 0, record["step"]  # checkpoints of before had no number


def _best(records: Mapping[int, Mapping[str, Any]]) -> int | None:
    scores = {step: record["score"] for step, record in records.items() if record.get("score") is not None}
    return max(scores, key=lambda step: (scores[step], -step), default=None)


def _written_here(path: Path) -> bool:
    """Whether a file of tensors was written by `CheckpointFolder.save` under this name."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            by = (file.metadata() or {}).get("written_by", "")
    except (SafetensorError, OSError):
        return False
    step = by.removeprefix(_WRITTEN_BY)
    return by.startswith(_WRITTEN_BY) and step.isdecimal() and re.match(rf"step-0*{step}\b", path.name) is not None


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read one checkpoint by the path of either of its files, and verify it. Raises CheckpointError."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(values.path("path", path))
    if path.suffix == ".safetensors":
        path = path.with_suffix(".json")
    record = _read_record(path)
    wanted = record["tensors"]
    tensor_path = path.with_name(wanted["file"])
    try:
        data = tensor_path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{tensor_path}: cannot be read ({error.strerror}), but {path.name} needs it") from error
    if len(data) != wanted["bytes"]:
        raise CheckpointError(f"{tensor_path}: damaged, {len(data)} bytes where {wanted['bytes']} were written")
    if hashlib.sha256(data).hexdigest() != wanted["sha256"]:
        raise CheckpointError(f"{tensor_path}: damaged, its SHA-256 is not the one in {path.name}")
    try:
        return Checkpoint(path, record["step"], record, load(data))
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that it does not know
        raise CheckpointError(f"{tensor_path}: not a safetensors file ({error})") from error


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors called `<parameter>/<key>` and the JSON of all the rest."""
    state = optimizer.state_dict()
    tensors, values = {}, {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            (tensors if isinstance(value, Tensor) else values)[f"{index}/{key}"] = value
    return tensors, {"values": values, "groups": state["param_groups"], "tensors": sorted(tensors)}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """The inverse of `pack_optimizer`, to the bit and with each parameter's memory layout."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *rest["values"].items()]:
        index, key = name.split("/", 1)
        if isinstance(value, Tensor) and value.shape == parameters[int(index)].shape:
            # In the parameter's own strides, as the optimizer would have made it: another layout may round
            # differently.
            value = torch.empty_like(parameters[int(index)], dtype=value.dtype, requires_grad=False).copy_(value)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": rest["groups"]})


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
        fingerprint = _fingerprint(record) if isinstance(record, dict) else None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged, not JSON ({error})") from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: damaged, JSON that is nested too deeply") from error
    if not isinstance(record, dict) or "format" not in record:
        raise CheckpointError(f"{path}: not a fastmeta checkpoint")
    if record["format"] != FORMAT:
        raise CheckpointError(f"{path}: format {record['format']}, this fastmeta reads format {FORMAT}")
    if record.get("sha256") != fingerprint:
        raise CheckpointError(f"{path}: damaged, its content does not match its own SHA-256")
    for key, kinds in _KEYS.items():
        if not of_kind(record.get(key), kinds):
            raise CheckpointError(f"{path}: {key} must be {kinds[0].__name__}, got {values.shown(record.get(key))}")
    for key, kind in (("file", str), ("bytes", int), ("sha256", str)):
        if not of_kind(record["tensors"].get(key), (kind,)):
            found = values.shown(record["tensors"].get(key))
            raise CheckpointError(f"{path}: tensors.{key} must be {kind.__name__}, got {found}")
    if Path(record["tensors"]["file"]).name != record["tensors"]["file"]:
        raise CheckpointError(f"{path}: tensors.file must be a name, got {record['tensors']['file']!r}")
    named = _NAME.fullmatch(path.name)
    if named and int(named[1]) != record["step"]:
        raise CheckpointError(f"{path}: the checkpoint of step {record['step']}, put under another one's name")
    return record


_KEYS = {"step": (int,), "tensors": (dict,), "score": (float, int, type(None)), "saves": (int, type(None))}


def of_kind(value: Any, kinds: tuple[type, ...]) -> bool:
    """Whether a value of JSON is of one of these types: True is no number."""
    return isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)


def _fingerprint(record: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key != "sha256"}
    # Through JSON once, so that tuples and int keys hash as they will read back.
    text = json.dumps(json.loads(json.dumps(rest)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, all of it or nothing, so that it is on the disk when this returns. Raises OSError, which names
    the file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # another process may write the same file
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _about(path, error) from error
    if os.name == "posix":  # the rename itself must reach the disk before the next file is begun
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def append(path: Path, text: str) -> None:
    """Add lines to a file. Raises OSError, which names it."""
    try:
        with open(path, "a", encoding="utf-8") as file:  # opened anew each time: no handle outlives a run
            file.write(text)
    except OSError as error:
        raise _about(path, error) from error


def _about(path: Path, error: OSError) -> OSError:
    """A disk that is full, for one, does not say what was being written."""
    return type(error)(error.errno, f"cannot be written: {error.strerror}", str(path))


def check_writable(folder: Path) -> None:
    """Make a folder if it is absent, and raise OSError, which names it, unless files can be written there. For what
    would else find out when there is much to lose."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"?")
    except OSError as error:
        raise OSError(f"{folder} cannot be written: {error.strerror}") from error


def versions() -> dict[str, str]:
    import fastmeta

    return {"fastmeta": fastmeta.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
