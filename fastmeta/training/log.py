"""`log.jsonl` in a run's folder: what was reported, an object a line, for whoever reads it later or meanwhile."""

from __future__ import annotations

import json
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .checkpoint import append, versions, write_whole
from .loop import Progress, Reporter
from .metrics import finite_or_none

if TYPE_CHECKING:
    from .evaluate import Evaluation

NAME = "log.jsonl"


class LogReporter(Reporter):
    """Appends to `folder/log.jsonl`, which is made with the folder; each line is on its way to the disk when it is
    written.

    Lines are objects with `step` and `seconds` (of training, over all resumes), and one of: `tasks_per_second`,
    `outer_lr`, `loss` and, in classification, `accuracy`, means since the line before; `validation`, what
    `Evaluation.as_json` gives, and `best`; `test`, the same of the best checkpoint; `started`, the time, with `machine`
    and `versions`; `left_out`, why this step was; `task_chunk`, how many tasks run at a time from this step on, or
    "all", and `why`; `note`, what is not used though it was asked for. `skipped` counts
    those so far, where there are any.

    Args: step, seconds: where the run begins or goes on. Lines of later steps, and what a crash left half written, are
        cut: they will be written again. device: what the run is on.
    """

    def __init__(self, folder: str | Path, *, step: int = 0, seconds: float = 0.0, device: torch.device):
        self.path = Path(folder) / NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_log(folder) if step and line["step"] <= step]
        write_whole(self.path, "".join(map(_line, kept)).encode())
        self._seconds = seconds
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._write(step, started=now, machine=machine(device), versions=versions())

    def progress(self, progress: Progress) -> None:
        self._seconds = progress.seconds
        numbers = {name: finite_or_none(value) for name, value in progress._asdict().items()}
        del numbers["step"], numbers["seconds"]
        numbers["skipped"] = progress.skipped or None
        self._write(progress.step, **numbers)

    def skipped(self, step: int, cause: str) -> None:
        self._write(step, left_out=cause)

    def chunked(self, step: int, tasks: int | None, why: str) -> None:
        self._write(step, task_chunk="all" if tasks is None else tasks, why=why)

    def left_out(self, step: int, what: str) -> None:
        self._write(step, note=what)

    def validation(self, step: int, evaluation: Evaluation, best: bool) -> None:
        self._write(step, validation=evaluation.as_json(), best=best)

    def test(self, step: int, evaluation: Evaluation) -> None:
        """Held-out tasks of the split "test", judged after training on the checkpoint of `step`."""
        self._write(step, test=evaluation.as_json())

    def _write(self, step: int, **what: Any) -> None:
        what = {name: value for name, value in what.items() if value is not None}
        append(self.path, _line({"step": step, "seconds": round(self._seconds, 6), **what}))


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's log, none if there is no log. What follows a line that is no such object is left out."""
    try:
        text = (Path(folder) / NAME).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        try:
            one = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(one, dict) or not isinstance(one.get("step"), int):
            break
        found.append(one)
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure of throughput is a figure of."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": gpu or "CPU", "processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }  # fmt: skip


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _line(one: dict[str, Any]) -> str:
    return json.dumps(one, allow_nan=False) + "\n"
