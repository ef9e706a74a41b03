"""What a checkpoint holds, put back where it came from; what does not fit is named by file and key.

Its checksums say that a checkpoint is as it was written, not that it is of this run, or that what was written was
sound. So everything is looked at before a run goes on with it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..values import dtype_of, shown
from .checkpoint import Checkpoint, CheckpointError, of_kind, unpack_optimizer


def load_model(algorithm: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's model into `algorithm`. Raises CheckpointError where names, shapes or dtypes differ, and for
    weights that are not finite."""
    given = checkpoint.group("model")
    for name, own in algorithm.state_dict().items():
        if name in given and isinstance(own, Tensor) and given[name].dtype != own.dtype:
            raise _misfit(checkpoint, f"model/{name}", f"is {dtype_of(given[name])}, and this run's {dtype_of(own)}")
    for name, _ in algorithm.named_parameters():  # buffers may hold infinities: masks do
        if name in given:
            _check_finite(checkpoint, f"model/{name}", given[name])
    try:
        algorithm.load_state_dict(given)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{checkpoint.path}: does not fit the model: {reason}") from error


def load_optimizer(optimizer: torch.optim.Adam, checkpoint: Checkpoint) -> None:
    """Put back the optimizer's state. Raises CheckpointError for parts that are missing or do not fit."""
    rest = expect(checkpoint, "optimizer", dict)
    held = {kind: rest.get(kind) for kind in ("values", "groups")}
    if not isinstance(held["values"], dict) or not isinstance(held["groups"], list):
        raise _misfit(checkpoint, "optimizer", "has no values or groups")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = checkpoint.group("optimizer")
    parts = {name.partition("/")[0] for name in tensors}
    # what was written is listed; before it was, each parameter had all of Adam's state or none
    listed = rest.get("tensors") or [f"{i}/{key}" for i in parts for key in ("step", "exp_avg", "exp_avg_sq")]
    for name in listed:
        if name not in tensors:
            raise _misfit(checkpoint, f"optimizer/{name}", "is missing")
    for name, tensor in tensors.items():
        index, _, key = name.partition("/")
        if name not in listed or not index.isdecimal() or int(index) >= len(parameters):
            raise _misfit(checkpoint, f"optimizer/{name}", "is of nothing in this run")
        parameter = parameters[int(index)]
        shape = () if key == "step" else tuple(parameter.shape)
        if tuple(tensor.shape) != shape:
            found = f"has shape {list(tensor.shape)}"
            raise _misfit(checkpoint, f"optimizer/{name}", f"{found}, and this run's {list(shape)}")
        if key != "step" and tensor.dtype != parameter.dtype:
            found = f"is {dtype_of(tensor)}"
            raise _misfit(checkpoint, f"optimizer/{name}", f"{found}, and this run's {dtype_of(parameter)}")
        _check_finite(checkpoint, f"optimizer/{name}", tensor)
    for i, (own, group) in enumerate(zip(optimizer.param_groups, held["groups"], strict=False)):
        for key in ("lr", "betas", "eps", "weight_decay"):
            number = group.get(key) if isinstance(group, dict) else None
            if not all(of_kind(one, (float, int)) for one in (number if key == "betas" and number else [number])):
                raise _misfit(checkpoint, f"optimizer.groups[{i}].{key}", f"must be as {own[key]}, got {number}")
    try:
        unpack_optimizer(optimizer, tensors, rest)
    except (KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
        reason = f"does not fit this run ({' '.join(str(error).split())})"
        raise _misfit(checkpoint, "optimizer", reason) from error


def random_states(checkpoint: Checkpoint, device: torch.device) -> dict[str, Tensor]:
    """The states of the random generators by name: "cpu" and "sampler", and "cuda" where the run was on one.

    "sampler" is left out where it is of another kind of device than `device`. Raises CheckpointError for a state that
    is missing, or that no generator takes.
    """
    states = checkpoint.group("rng")
    where = "cuda" if "cuda" in states else "cpu"
    kinds = {"cpu": "cpu", "sampler": where, where: where}
    for name, kind in kinds.items():
        if name not in states:
            raise _misfit(checkpoint, f"rng/{name}", "is missing")
        if kind == "cpu" or device.type == "cuda":
            try:
                torch.Generator(kind).set_state(states[name])
            except (RuntimeError, TypeError) as error:
                reason = f"is no state of a random generator ({' '.join(str(error).split())})"
                raise _misfit(checkpoint, f"rng/{name}", reason) from error
    return {name: states[name] for name, kind in kinds.items() if name == "cpu" or kind == device.type}


def expect(checkpoint: Checkpoint, key: str, *kinds: type) -> Any:
    """What the record has under `key`, of one of `kinds`; numbers must be finite. Raises CheckpointError."""
    found = checkpoint.record.get(key)
    if not of_kind(found, kinds):
        reason = f"must be {kinds[0].__name__}, got {shown(found)}" if key in checkpoint.record else "is missing"
        raise _misfit(checkpoint, key, reason)
    if isinstance(found, (int, float)) and not math.isfinite(found):
        raise _misfit(checkpoint, key, f"must be finite, got {found}")
    return found


def history(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The validations so far, each with its step. Raises CheckpointError."""
    found = expect(checkpoint, "history", list)
    for i, one in enumerate(found):
        if not (isinstance(one, dict) and of_kind(one.get("step"), (int,))):
            raise _misfit(checkpoint, f"history[{i}]", "has no step")
    return list(found)


def _check_finite(checkpoint: Checkpoint, name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise _misfit(checkpoint, name, "has values that are not finite")


def _misfit(checkpoint: Checkpoint, key: str, what: str) -> CheckpointError:
    return CheckpointError(f"{checkpoint.path}: {key} {what}")

