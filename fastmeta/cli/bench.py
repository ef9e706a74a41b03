"""`fastmeta bench`: the benchmark suite, with a bar, a table, and a folder of results."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..benchmarks import plots, report
from ..benchmarks.compare import Change, compare
from ..benchmarks.run import QUICK, Plan, run
from ..training.checkpoint import check_writable
from ._results import write


def bench(plan: Plan, *, folder: Path | None, before: Path | None, out: Console, err: Console) -> int:
    """Run, print and write; the exit code: 130 where it was interrupted, 1 where a row is slower than in `before`, or a
    contender gives other numbers than ours."""
    earlier = _read(before) if before is not None else None
    if folder is not None:
        check_writable(folder)

    def save(found: dict) -> None:  # after every case: a process that is killed leaves what it has
        if folder is not None:
            write(folder / "results.json", json.dumps(found, indent=1) + "\n")

    columns = SpinnerColumn(), TextColumn("{task.completed}/{task.total} {task.description}"), TimeElapsedColumn()
    with warnings.catch_warnings(), Progress(*columns, console=err, transient=True) as bar:
        warnings.simplefilter("ignore")  # those of contenders
        shown = bar.add_task("", total=len(plan.groups))
        found = run(plan, lambda done, name: bar.update(shown, completed=done, description=name), save)
    out.print(_table(found))
    for line in report.absences(found["cases"]):
        err.print(f"not timed: {line}", markup=False, highlight=False, soft_wrap=True)
    code = 0
    for case in found["cases"]:
        for name in case["unlike"]:
            err.print(f"[bold red]other numbers than fastmeta's:[/bold red] {name} in {case['name']}", highlight=False)
            code = 1
    if folder is not None:
        save(found)
        pictures: tuple[str, ...] = ()
        try:
            pictures = plots.draw(found, folder)
        except ImportError as error:
            err.print(str(error), markup=False, highlight=False)
        write(folder / "report.md", report.markdown(found, pictures))
        out.print(f"results.json, report.md and {len(pictures)} pictures in {folder}", markup=False, highlight=False)
    if earlier is not None and found["cases"]:
        if earlier["machine"] != found["machine"]:
            err.print("the other run is of another machine or another torch: take its rows with care", style="yellow")
        changes = compare(found, earlier)
        out.print(_changes(changes))
        code = max(code, int(any(change.slower for change in changes)))
    if not found["complete"]:
        err.print("interrupted: the rows above are what was done", style="yellow")
        code = 130
    return code


def _table(found: dict) -> Table:
    table = Table("workload", "fastmeta ms", "others' time over ours", title=found["command"], title_justify="left")
    for row in report.summary(found["cases"]):
        table.add_row(*row)
    return table


def _changes(changes: list[Change]) -> Table:
    title = "times as long as before, the machine's own change taken out"
    table = Table("workload", "before ms", "now ms", "times", "allowed", "", title=title, title_justify="left")
    for c in changes:
        figures = f"{c.before_ms:.3f}", f"{c.now_ms:.3f}", f"{c.times:.2f}", f"{c.allowed:.2f}"
        table.add_row(c.name, *figures, "[bold red]SLOWER[/bold red]" if c.slower else "")
    return table


def _read(path: Path) -> dict:
    """Results of an earlier run. Raises ValueError where the file holds none."""
    try:
        found = json.loads(path.read_text())
        if found["machine"] and all(case["contenders"]["fastmeta"] for case in found["cases"]):
            return found
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--compare: {path} holds no results of fastmeta bench: {error}") from error
    raise ValueError(f"--compare: {path} holds no results of fastmeta bench")


def plan_of(
    groups: list[str] | None,
    against: list[str] | None,
    device: str | None,
    dtype: str,
    seconds: float | None,
    threads: int | None,
    quick: bool,
) -> Plan:
    """What is asked for, with defaults."""
    chosen = device if device not in (None, "auto") else "cuda" if torch.cuda.is_available() else "cpu"
    seconds = seconds or (QUICK if quick else Plan.seconds)
    return Plan(tuple(groups or Plan.groups), tuple(against or ()), chosen, dtype, seconds, threads, quick)
