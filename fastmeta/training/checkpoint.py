"""Checkpoints: tensors in safetensors, everything else in JSON, whole or not at all.

A checkpoint is a pair `step-00000100.safetensors` and `step-00000100.json`. The tensors are written first and
the JSON, which holds their checksum, last: each to a temporary name in the same folder, flushed to the disk,
then renamed. A crash at any moment leaves either the whole pair or no JSON, so what carries a JSON was
complete once, and what was damaged since is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import values

FORMAT = 1
_NAME = re.compile(r"step-(\d+)\.json")


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
    """The checkpoints of one run. Keeps the newest `keep` of them, and the best by validation."""

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder = Path(values.path("folder", folder))
        self.keep = values.count("keep", keep)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, whole or damaged since; oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for entry in self.folder.iterdir() if (match := _NAME.fullmatch(entry.name)))

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.json"

    def save(self, step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Path:
        """Write the checkpoint of `step` and drop the ones no longer kept.

        `record` must be JSON; its key `"score"`, a number where larger is better or None, decides which one
        is best.
        """
        from safetensors.torch import save

        self.folder.mkdir(parents=True, exist_ok=True)
        # clone: safetensors refuses tensors that share memory, and tied weights do
        data = save({name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()})
        path = self.path(step)
        tensor_path = path.with_suffix(".safetensors")
        path.unlink(missing_ok=True)  # what is about to be replaced is no checkpoint from here on
        write_whole(tensor_path, data)
        body = {
            **record,
            "format": FORMAT,
            "step": step,
            "versions": versions(),
            "tensors": {"file": tensor_path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
        }
        body["sha256"] = _fingerprint(body)
        write_whole(path, (json.dumps(body, indent=1, allow_nan=False) + "\n").encode())
        self._prune()
        return path

    def load(self, step: int) -> Checkpoint:
        return load_checkpoint(self.path(step))

    def newest(self, *, fall_back: bool = False) -> tuple[Checkpoint, list[CheckpointError]]:
        """The newest checkpoint, and with `fall_back` the complaints about the damaged ones passed over.

        Without `fall_back` a damaged newest checkpoint raises its CheckpointError, as does a folder without
        any.
        """
        complaints: list[CheckpointError] = []
        for step in reversed(self.steps()):
            try:
                return self.load(step), complaints
            except CheckpointError as error:
                if not fall_back:
                    raise
                complaints.append(error)
        damaged = "".join(f"; {error}" for error in complaints)
        raise CheckpointError(f"{self.folder}: no checkpoint to load{damaged}")

    def best(self) -> Checkpoint:
        """The checkpoint with the best validation score, or the newest where none was validated."""
        scores = self._scores()
        return self.load(max(scores, key=lambda step: (scores[step], -step))) if scores else self.newest()[0]

    def _scores(self) -> dict[int, float]:
        scores = {}
        for step in self.steps():
            try:
                score = _read_record(self.path(step)).get("score")
            except CheckpointError:
                continue  # a damaged one cannot be the best; loading it by name says what is wrong
            if score is not None:
                scores[step] = score
        return scores

    def _prune(self) -> None:
        steps, scores = self.steps(), self._scores()
        best = max(scores, key=lambda step: (scores[step], -step)) if scores else None
        for step in steps[: -self.keep]:
            if step != best:
                self.path(step).unlink(missing_ok=True)  # the JSON first: tensors alone are no checkpoint
                self.path(step).with_suffix(".safetensors").unlink(missing_ok=True)
        # What a crash between two files left behind.
        whole = {self.path(step).stem for step in self.steps()}
        for stray in (*self.folder.glob(".step-*.tmp"), *self.folder.glob("step-*.safetensors")):
            if stray.suffix == ".tmp" or stray.stem not in whole:
                stray.unlink(missing_ok=True)


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
    except SafetensorError as error:
        raise CheckpointError(f"{tensor_path}: not a safetensors file ({error})") from error


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors called `<parameter>/<key>` and the JSON of all the rest."""
    state = optimizer.state_dict()
    tensors, values = {}, {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            (tensors if isinstance(value, Tensor) else values)[f"{index}/{key}"] = value
    return tensors, {"values": values, "groups": state["param_groups"]}


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
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged, not JSON ({error})") from error
    if not isinstance(record, dict) or "format" not in record:
        raise CheckpointError(f"{path}: not a fastmeta checkpoint")
    if record["format"] != FORMAT:
        raise CheckpointError(f"{path}: format {record['format']}, this fastmeta reads format {FORMAT}")
    if record.get("sha256") != _fingerprint(record):
        raise CheckpointError(f"{path}: damaged, its content does not match its own SHA-256")
    return record


def _fingerprint(record: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key != "sha256"}
    # Through JSON once, so that tuples and int keys hash as they will read back.
    text = json.dumps(json.loads(json.dumps(rest)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, all of it or nothing, so that it is on the disk when this returns."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # the rename itself must reach the disk before the next file is begun
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


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
