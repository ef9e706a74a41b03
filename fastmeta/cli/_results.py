"""Results of rows that are run once."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..training.checkpoint import write_whole


def once(
    path: Path, run: Callable[[Path], dict[str, Any] | None] | None, judged: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The result at `path`; where there is none, or one that is damaged or was judged otherwise than `judged` says,
    that of `run(folder)`, which is kept. None where `run` is None, or gives None because it was stopped."""
    kept = _read(path)
    if kept is not None and kept.get("judged") == dict(judged):
        return kept
    if run is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    result = run(path.parent)
    if result is None:
        return None
    result = {**result, "judged": dict(judged)}
    write(path, json.dumps(result, indent=1) + "\n")
    return json.loads(path.read_text())


def write(path: Path, text: str) -> None:
    """All of it or nothing: a run that is killed leaves no half a result."""
    write_whole(path, text.encode())


def machine(device: torch.device) -> dict[str, Any]:
    """What a result was found on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": str(device), "machine": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
