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


def run_case(case: suite.Case, seconds: float, peak: dict[str, float]) -> dict:
    measure.check_equal(case.contenders)
    times = measure.interleaved({**case.contenders, **case.yardsticks}, seconds)
    medians = {name: statistics.median(t) for name, t in times.items()}
    ours = medians.get("fastmeta")
    record = {"name": case.name, "contenders": {name: measure.summary(t) for name, t in times.items()}}
    if ours is not None:
        record["ratios"] = {name: m / ours for name, m in medians.items() if name != "fastmeta"}
        record["bars"] = {n: {"bar": b, "met": medians[n] / ours >= b} for n, b in case.bars.items()}
        record["at_most"] = {n: {"bar": b, "met": ours / medians[n] <= b} for n, b in case.at_most.items()}
    if case.flops:
        record["bound_ms"] = roofline.bound_ms(case.flops, case.bytes, peak)
    return record


def markdown(report: dict) -> str:
    machine, peak = report["machine"], report["peak"]
    lines = [
        f"# Measured {report['date']}",
        "",
        f"{machine['cpu']}, {machine['threads']} threads ({machine['cpu_capability']}), GPU: {machine['gpu']}, torch "
        f"{machine['torch']}, float32; large GEMM {peak['gflops']:.0f} GFLOP/s, copy {peak['gbytes']:.0f} GB/s. "
        f"Command: `{report['command']}`. Medians of interleaved rounds; ratio = contender / fastmeta; bound = least "
        "time for the arithmetic and the bytes at those rates.",
        "",
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
            ratio, bar = case.get("ratios", {}).get(name), case.get("bars", {}).get(name)
            most = case.get("at_most", {}).get(name)
            if most:
                bar = {"met": most["met"], "bar": f">= {1 / most['bar']:.2f}"}
            found.append(
                (
                    case["name"],
                    name,
                    f"{times['median_ms']:.3f}",
                    f"{ratio:.2f}" if ratio else "",
                    f"{'met' if bar['met'] else 'MISSED'} {bar['bar']}" if bar else "",
                    f"{case['bound_ms']:.3f}" if "bound_ms" in case and name == "fastmeta" else "",
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
    peak = roofline.measure(device)
    cases = []
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("timing", total=len(groups))
        for name in groups:
            for case in suite.GROUPS[name](Make(torch.float32, device)):
                cases.append(run_case(case, seconds, peak))
            progress.advance(bar)
    report = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": "python -m benchmarks" + "".join(f" --group {g}" for g in group or []),
        "machine": roofline.machine(),
        "peak": peak,
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
