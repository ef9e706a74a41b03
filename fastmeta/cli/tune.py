"""`fastmeta tune`: measure where one way becomes faster than another, and keep it for this machine."""

from __future__ import annotations

import json

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..benchmarks.tune import Found
from ..benchmarks.tune import tune as measured
from ..dispatch import tuned
from ._results import write


def tune(*, seconds: float, out: Console, err: Console) -> None:
    """Measure every automatic choice with as many threads as there are now, print it, and write it to the cache."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    found: list[Found] = []
    with Progress(*columns, console=err, transient=True) as bar:
        shown = bar.add_task("")
        for one in measured(seconds, lambda name, size: bar.update(shown, description=f"{name}, {size:,.4g}")):
            found.append(one)
    table = Table("choice", "sizes", "first way ms", "second way ms", "built in", "here", title="automatic choices")
    for one in found:
        sizes = "\n".join(f"{size:,.4g}" for size in one.times)
        first, second = ("\n".join(f"{ways[i] * 1e3:.2f}" for ways in one.times.values()) for i in (0, 1))
        table.add_row(one.name, sizes, first, second, f"{one.built_in:,.4g}", f"[bold]{one.number:,.4g}[/bold]")
    out.print(table)
    for one in found:
        out.print(f"{one.name}: {tuned.CHOICES[one.name]}", markup=False, highlight=False, soft_wrap=True)
    threads = {**tuned.stored(), str(torch.get_num_threads()): {one.name: one.number for one in found}}
    path = tuned.path()
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps({"machine": tuned.machine(), "threads": threads}, indent=1) + "\n")
    tuned.stored.cache_clear()
    kept = f"kept in {path} for {torch.get_num_threads()} threads; fastmeta tune --reset takes it away"
    out.print(kept, markup=False, highlight=False, soft_wrap=True)


def reset(out: Console) -> None:
    """Take away what was measured."""
    path = tuned.path()
    there = path.exists()
    path.unlink(missing_ok=True)
    tuned.stored.cache_clear()
    told = f"{path} is {'gone' if there else 'not there'}: the built-in choices hold"
    out.print(told, markup=False, highlight=False, soft_wrap=True)
