"""Tables of what was measured, and the page that has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "conv.md"
BEGIN, END = "<!-- measured: python -m benchmarks.conv -->", "<!-- end of what was measured -->"
HEADS = ("workload", "fastmeta ms", "fastest peer", "times as fast", "fastest plain step", "times its time")


def _bar(found: dict, sign: str) -> str:
    if found["bar"] is None:
        return f"{found['ratio']:.2f}"
    return f"{found['ratio']:.2f} ({'' if found['met'] else 'MISSED '}{sign} {found['bar']:.3g})"


def _title(row: dict) -> str:
    return row["title"] + ("" if row["dtype"] == "float32" else f", {row['dtype']}")


def summary(rows: list[dict]) -> Iterator[tuple[str, ...]]:
    """A line a row, under `HEADS`."""
    for row in rows:
        plain = row.get("supervised")
        yield (
            _title(row),
            f"{row['contenders']['fastmeta']['median_ms']:.1f}",
            row["peer"]["name"],
            _bar(row["peer"], ">="),
            plain["name"].removeprefix("supervised").lstrip(", ") or "supervised" if plain else "",
            _bar(plain, "<=") if plain else "",
        )


def _table(heads: tuple[str, ...], lines) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (heads, ("---",) * len(heads), *lines)]


def everybody(row: dict) -> Iterator[tuple[str, ...]]:
    """A line a contender, quickest first: name, median ms, times fastmeta's time."""
    ours = row["contenders"]["fastmeta"]["median_ms"]
    found = {name: (times["median_ms"], "") for name, times in row["contenders"].items()}
    found |= {name: (ms, ", one call") for name, ms in row["one_call_ms"].items()}
    for name, (ms, note) in sorted(found.items(), key=lambda item: item[1][0]):
        yield name + note, f"{ms:.1f}", f"{ms / ours:.2f}"
    for name, reason in row["skipped"].items():
        yield name, "", reason.replace("|", "/")


def losses(rows: list[dict]) -> list[str]:
    """Who is faster than ours where, plain training aside."""
    found = []
    for row in rows:
        ours = row["contenders"]["fastmeta"]["median_ms"]
        for name, times in row["contenders"].items():
            if times["median_ms"] < ours and not name.startswith(("fastmeta", "supervised")):
                found.append(f"- {_title(row)}: {name}, {ours / times['median_ms']:.2f} times as fast as fastmeta.")
    return found or ["No peer is faster than fastmeta in any row."]


def memory(found: dict) -> list[str]:
    lines = [(run["contender"], str(run["steps"]), f"{run['megabytes']:.0f}") for run in found["runs"]]
    said = (
        f"{found['title']}: the least peak memory is {_bar(found['of_the_loops_graph'], '<=')} of that of the loop "
        f"whose losses are summed, and with K = 20 {_bar(found['k20_of_k5'], '<=')} times that with K = 5."
    )
    return [said, "", *_table(("contender", "K", "MB above the data"), lines)]


def markdown(report: dict) -> str:
    """All of the report."""
    machine, rows = report["machine"], report["rows"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads ({machine['cpu_capability']}), GPU: {machine['gpu']}, torch "
        f"{machine['torch']}; {report['date']}, command `{report['command']}`. Medians of interleaved rounds; all "
        "gradients are equal in float64.",
        "",
        *_table(HEADS, summary(rows)),
        "",
        *losses(rows),
    ]
    if report.get("memory"):
        lines += ["", *memory(report["memory"])]
    for row in rows:
        engine = f" (engine `{row['engine']}`)" if row["engine"] else ""
        lines += ["", f"**{_title(row)}**{engine}", "", *_table(("contender", "ms", "of fastmeta"), everybody(row))]
    return "\n".join(lines) + "\n"


def merged(report: dict, before: dict | None) -> dict:
    """`report` with what an earlier run has beside it: rows that this one did not measure, on the same machine."""
    if before is None or before["machine"] != report["machine"]:
        return report

    def name(row: dict) -> tuple:
        return row["key"], row["dtype"], row["small"]

    mine = {name(row): row for row in report["rows"]}
    rows = {name(row): row for row in before["rows"]} | mine
    return {**report, "rows": list(rows.values()), "memory": report.get("memory") or before.get("memory")}


def write_page(report: dict) -> None:
    """The tables of docs/conv.md."""
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + "\n".join([BEGIN, "", markdown(report) + END]) + rest.split(END)[1])
