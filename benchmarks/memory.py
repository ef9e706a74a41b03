"""`python -m benchmarks.memory`: peak memory of MAML meta-gradients on the CPU, each in a process of its own.

The figure is the process's largest resident size during the meta-gradient, less what it had before.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from . import contenders, roofline
from .problems import maml_batch

# name, widths, tasks, support rows, query rows, inner steps, contenders
WORKLOADS = (
    ("784-256-128-64-64-5 K20 T32", (784, 256, 128, 64, 64, 5), 32, 5, 75, 20, ("fastmeta", "torch.func")),
    ("784-64-64-5 K5 T256", (784, 64, 64, 5), 256, 5, 75, 5, ("fastmeta", "torch.func")),
    ("sinusoid 1-40-40-1 K1 T100000", (1, 40, 40, 1), 100_000, 10, 10, 1, ("fastmeta",)),
    ("sinusoid 1-40-40-1 K100 T10000", (1, 40, 40, 1), 10_000, 10, 10, 100, ("fastmeta",)),
)
SMALL = 4  # tasks of the run before the measured one, which loads libraries and starts threads


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (the most since it was reset) of this process in MB; Linux only."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024


def measure(index: int, contender: str) -> dict[str, float]:
    """Runs one meta-gradient here; the caller gives each its own process."""
    _, widths, tasks, shots, queries, steps, _ = WORKLOADS[index]

    def run(tasks):
        model, loss, batch, maml = maml_batch(widths, tasks, shots, queries, steps)
        if contender == "torch.func":
            return lambda: contenders.maml_by_vmap(model, loss, batch, 0.01, steps)
        return lambda: torch.autograd.grad(maml(batch).loss, list(maml.parameters()))

    run(SMALL)()
    whole = run(tasks)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before, began = resident("VmRSS"), time.perf_counter()
    whole()
    return {"megabytes": resident("VmHWM") - before, "seconds": time.perf_counter() - began}


def main(
    out: Annotated[Path | None, typer.Option(help="folder for memory.json; not written without it")] = None,
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Peak memory of meta-gradients, ours and torch.func's."""
    if one:
        index, contender = one.split(",")
        print(json.dumps(measure(int(index), contender)))
        return
    console, rows = Console(), []
    table = Table("workload", "contender", "peak MB", "seconds")
    for index, (name, *_, names) in enumerate(WORKLOADS):
        for contender in names:
            command = [sys.executable, "-m", f"{__package__}.memory", "--one", f"{index},{contender}"]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rows.append({"workload": name, "contender": contender, **found})
            table.add_row(name, contender, f"{found['megabytes']:.0f}", f"{found['seconds']:.2f}")
    console.print(table)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
        command = "python -m benchmarks.memory"
        report = {"date": date, "machine": roofline.machine(), "command": command, "rows": rows}
        (out / "memory.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
