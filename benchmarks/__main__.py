"""`python -m benchmarks`: time the suite, print it, and write JSON and a Markdown table to a results folder."""

from __future__ import annotations

import json
import statistics
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import measure, roofline, suite
from fastmeta import testing
from fastmeta.dispatch.spec import REGISTRY, Make

RESULTS = Path(__file__).parent / "results"


def gate(device: str) -> None:
    """Refuse to time what is wrong: every op's samples first, in float32 on `device`."""
    for spec in REGISTRY.values():
        for sample in spec.samples(Make(torch.float32, device)):
            testing.check_op(spec, sample.args)


def run_case(case: suite.Case, seconds: float) -> dict:
    measure.check_equal(case.contenders)
    times = measure.interleaved({**case.contenders, **case.yardsticks}, seconds)
    medians = {name: statistics.median(t) for name, t in times.items()}
    ours = medians["fastmeta"]
    return {
        "name": case.name,
        "contenders": {name: measure.summary(t) for name, t in times.items()},
        "ratios": {name: m / ours for name, m in medians.items() if name != "fastmeta"},
        "bars": {n: {"bar": b, "met": medians[n] / ours >= b} for n, b in case.bars.items()},
        "at_most": {n: {"bar": b, "met": ours / medians[n] <= b} for n, b in case.at_most.items()},
        "same_work": list(case.contenders),  # the others are yardsticks
        "work": {"flops": case.flops, "nbytes": case.bytes},
    }


def add_bounds(cases: list[dict], peak: roofline.Peak) -> None:
    """To each case its bound, by the best rates of the whole run, and who beat it, which shows that it is none."""
    for case in cases:
        case["bound"] = peak.bound(**case["work"])
        quickest = {name: case["contenders"][name]["min_ms"] for name in case["same_work"]}
        case["below_bound"] = [name for name, ms in quickest.items() if ms < case["bound"]["ms"]]


def markdown(report: dict) -> str:
    machine, wrong = report["machine"], [case["name"] for case in report["cases"] if case["below_bound"]]
    lines = [
        f"# Measured {report['date']}",
        "",
        f"{machine['cpu']}, {machine['threads']} threads ({machine['cpu_capability']}), GPU: {machine['gpu']}, torch "
        f"{machine['torch']}, float32; {report['peak_in_words']}. Command: `{report['command']}`. Medians of "
        "interleaved rounds; ratio = contender / fastmeta; bound = least time at those rates for the fewest FLOPs "
        "known to give the exact answer (benchmarks/counts.py) or for the bytes that must move, whichever is longer.",
        "",
        *(f"**Error in the bound, beaten by a contender: {name}.**\n" for name in wrong),
        "| workload | contender | median ms | ratio | bar | bound ms |",
        "|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in rows(report["cases"])]
    return "\n".join(lines) + "\n"


def rows(cases: list[dict]) -> list[tuple[str, ...]]:
    """One row per contender: workload, contender, median ms, ratio, bar, bound ms."""
    found = []
    for case in cases:
        for name, times in case["contenders"].items():
            ratio, bar, most = case["ratios"].get(name), case["bars"].get(name), case["at_most"].get(name)
            if most:
                bar = {"met": most["met"], "bar": f">= {1 / most['bar']:.2f}"}
            bound = f"{case['bound']['ms']:.3f}, {case['bound']['by']}" if name == "fastmeta" else ""
            if name in case["below_bound"]:
                bound = f"ERROR in the bound: beats {case['bound']['ms']:.3f}, {case['bound']['by']}"
            found.append(
                (
                    case["name"],
                    name,
                    f"{times['median_ms']:.3f}",
                    f"{ratio:.2f}" if ratio else "",
                    f"{'met' if bar['met'] else 'MISSED'} {bar['bar']}" if bar else "",
                    bound,
                )
            )
    return found


def main(
    group: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(suite.GROUPS)}; all by default")] = None,
    device: Annotated[str, typer.Option()] = "cuda" if torch.cuda.is_available() else "cpu",
    seconds: Annotated[float, typer.Option(help="time per workload")] = 4.0,
    out: Annotated[Path | None, typer.Option(help="folder for the results; not written without it")] = None,
    label: Annotated[str, typer.Option(help="name of the files")] = "suite",
) -> None:
    """Time fastmeta beside its peers on the same work in the same run."""
    console = Console()
    groups = group or list(suite.GROUPS)
    unknown = set(groups) - set(suite.GROUPS)
    if unknown:
        raise typer.BadParameter(f"--group must be of {', '.join(suite.GROUPS)}; got {', '.join(sorted(unknown))}")
    gate(device)
    peak, cases = roofline.Peak(device), []
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("timing", total=len(groups))
        for name in groups:
            peak.look()
            for case in suite.GROUPS[name](Make(torch.float32, device)):
                cases.append(run_case(case, seconds))
            progress.advance(bar)
    peak.look()
    add_bounds(cases, peak)
    report = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": "python -m benchmarks" + "".join(f" --group {g}" for g in group or []),
        "machine": roofline.machine(),
        "peak": peak.report(),
        "peak_in_words": peak.words(),
        "cases": cases,
    }
    table = Table("workload", "contender", "median ms", "ratio", "bar", "bound ms")
    for row in rows(cases):
        table.add_row(*row)
    console.print(table)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{label}.json").write_text(json.dumps(report, indent=1) + "\n")
        (out / f"{label}.md").write_text(markdown(report))


if __name__ == "__main__":
    typer.run(main)
