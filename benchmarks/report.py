"""What a run found, as Markdown; and the README's tables, which `python -m benchmarks.report` makes of committed
results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
IN_README = Path(__file__).parent / "results" / "epyc-2core-avx2"  # the machine whose figures the README has
TABLES = {  # in the README: where each begins, and the file of results that it shows
    "<!-- measured: fastmeta bench -->": "results.json",
    "<!-- measured: python -m benchmarks.memory -->": "memory.json",
}
END = "<!-- end of what was measured -->"
SHOWN = (  # groups of the suite that the README has
    "prototypical_loss", "contrastive_loss", "pairwise_distance", "fast_weight_update", "functional_mlp",
    "task_weights", "maml", "maml_module", "maml_conv", "protonet",
)  # fmt: skip


def summary(cases: list[dict]) -> Iterator[tuple[str, str, str]]:
    """A line a case: workload, our milliseconds, everybody's time over ours."""
    for case in cases:
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in case["ratios"].items())
        yield case["name"], f"{case['contenders']['fastmeta']['median_ms']:.3f}", ratios


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


def absences(cases: list[dict]) -> list[str]:
    """Who was not timed where, and why: a line a reason."""
    where: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for name, reason in case["absent"].items():
            where.setdefault((name, " ".join(reason.split())), []).append(case["name"])
    return [
        f"{name}: {reason} ({cases[0]}{f' and {len(cases) - 1} more' if len(cases) > 1 else ''})"
        for (name, reason), cases in where.items()
    ]


def table(heads: tuple[str, ...], lines) -> list[str]:
    cells = [[cell.replace("|", "/") for cell in line] for line in (heads, *lines)]
    first, *rest = (f"| {' | '.join(line)} |" for line in cells)
    return [first, "|" + "---|" * len(heads), *rest]


def markdown(report: dict, pictures: tuple[str, ...] = ()) -> str:
    """The page of a run."""
    machine, wrong = report["machine"], [case["name"] for case in report["cases"] if case["below_bound"]]
    unlike = [f"{name} in {case['name']}" for case in report["cases"] for name in case["unlike"]]
    lines = [
        f"# Measured {report['date']}",
        "",
        f"{machine['cpu']}, {machine['threads']} threads ({machine['cpu_capability']}), GPU: {machine['gpu']}, torch "
        f"{machine['torch']}, {report['dtype']} on {report['device']}; {report['peak_in_words']}. Command: "
        f"`{report['command']}`, {report['seconds'] / 60:.0f} minutes. Medians of interleaved rounds; ratio = "
        "contender / fastmeta; bound = least time at those rates for the fewest FLOPs known to give the exact answer "
        "(benchmarks/counts.py) or for the bytes that must move, whichever is longer.",
        "",
        *([] if report["complete"] else ["**Interrupted: there is more in the suite.**\n"]),
        *(f"**Error in the bound, beaten by a contender: {name}.**\n" for name in wrong),
        *(f"**Other numbers than fastmeta's: {name}.**\n" for name in unlike),
        *(f"![{name}]({name}.png)\n" for name in pictures),
        *table(("workload", "contender", "median ms", "ratio", "bar", "bound ms"), rows(report["cases"])),
    ]
    missing = absences(report["cases"])
    lines += ["", "Not timed:", "", *(f"- {line}" for line in missing)] if missing else []
    return "\n".join(lines) + "\n"


def of_memory(report: dict) -> list[str]:
    """The table of `python -m benchmarks.memory`."""
    rows = report["rows"]
    lines = ((r["workload"], r["contender"], f"{r['megabytes']:.1f}", f"{r['seconds']:.2f}") for r in rows)
    return table(("workload", "contender", "MB", "s"), lines)


def of_suite(report: dict) -> list[str]:
    cases = [case for case in report["cases"] if case["group"] in SHOWN]
    return table(("workload", "fastmeta ms", "ratios"), summary(cases))


def readme(text: str, folder: Path) -> str:
    """The README with its tables as the results in `folder` have them."""
    for begin, file in TABLES.items():
        report = json.loads((folder / file).read_text())
        lines = of_suite(report) if file == "results.json" else of_memory(report)
        before, rest = text.split(begin)
        text = before + "\n".join([begin, "", *lines, "", END]) + rest.split(END, 1)[1]
    return text


def main() -> None:
    """Write the README's tables."""
    README.write_text(readme(README.read_text(), IN_README))


if __name__ == "__main__":
    main()
