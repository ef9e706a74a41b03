"""Pictures of a run: how many times as fast, how time grows, and what the machine could do."""

from __future__ import annotations

from pathlib import Path

OURS, OTHERS = "#0072b2", ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#000000")


def draw(report: dict, folder: Path) -> tuple[str, ...]:
    """Write the pictures that the report has cases for, and return their names, without .png.

    Raises:
        ImportError: matplotlib is not installed.
    """
    drawn = []
    for name, picture in (("ratios", ratios), ("scaling", scaling), ("ceilings", ceilings)):
        figure = picture(report)
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=120)
            drawn.append(name)
    return tuple(drawn)


def _figure(width: float, height: float):
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("no pictures: matplotlib is not installed: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), layout="constrained")  # by hand: pyplot would look for a display
    FigureCanvasAgg(figure)
    return figure


def _head(report: dict) -> str:
    where = report["machine"]["gpu"] if report["device"] != "cpu" else report["machine"]["cpu"]
    return f"{where}, {report['machine']['threads']} threads, {report['dtype']}, {report['date']}"


def ratios(report: dict):
    """A bar a case: the time of the fastest peer over ours, and a mark for everybody else who does the same work."""
    found = []
    for case in report["cases"]:
        peers = {name: case["ratios"][name] for name in case["same_work"] if name in case["ratios"]}
        if peers:
            found.append((case["name"], min(peers, key=peers.__getitem__), peers))
    if not found:
        return None
    figure = _figure(11, 1.5 + 0.28 * len(found))
    axis = figure.subplots()
    for row, (_, fastest, peers) in enumerate(reversed(found)):
        axis.barh(row, peers[fastest] - 1, left=1, height=0.6, color=OURS if peers[fastest] >= 1 else OTHERS[0])
        axis.plot(list(peers.values()), [row] * len(peers), "|", color="black", markersize=7)
    axis.set_yticks(range(len(found)), [f"{name}  ({peer})" for name, peer, _ in reversed(found)], fontsize=7)
    axis.set_xscale("log")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xlabel("time of the fastest peer (named) over time of fastmeta; marks: every peer")
    axis.set_title(_head(report), fontsize=9)
    return figure


def scaling(report: dict):
    """A panel a curve, milliseconds over how much there is, both on log axes; a line a contender."""
    curves: dict[tuple[str, str], list[dict]] = {}
    for case in report["cases"]:
        if case["point"]:
            curves.setdefault(tuple(case["point"][:2]), []).append(case)
    curves = {key: cases for key, cases in curves.items() if len(cases) > 1}
    if not curves:
        return None
    figure = _figure(5 * len(curves), 4.2)
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for axis, ((title, what), cases) in zip(axes, curves.items(), strict=True):
        names = list(dict.fromkeys(name for case in cases for name in case["contenders"]))
        for name, colour in zip(names, [OURS, *OTHERS * len(names)], strict=False):
            points = [(c["point"][2], c["contenders"][name]["median_ms"]) for c in cases if name in c["contenders"]]
            axis.plot(*zip(*sorted(points), strict=True), "o-", color=colour, markersize=3, linewidth=1.2, label=name)
        axis.set(xscale="log", yscale="log", xlabel=what, ylabel="ms", title=title)
        axis.legend(fontsize=7, frameon=False)
    figure.suptitle(_head(report), fontsize=9)
    return figure


def ceilings(report: dict):
    """Roofline: FLOP/s that each case reaches, over the FLOPs a byte that it needs, under the machine's best rates."""
    cases = [case for case in report["cases"] if case["work"]["flops"] and case["work"]["nbytes"]]
    if not cases:
        return None
    peak = report["peak"]
    best = max(peak["multiply_add_gflops"], peak["product_gflops"])
    figure = _figure(9, 5.5)
    axis = figure.subplots()
    intensities = [case["work"]["flops"] / case["work"]["nbytes"] for case in cases]
    low, high = min(*intensities, 0.1) / 2, max(*intensities, 100) * 2
    for size, rate in peak["stream_gbytes"].items():
        ridge = best / rate
        axis.plot([low, ridge, high], [low * rate, best, best], color="#bbbbbb", linewidth=0.8)
        of = f"{int(size) >> 10} KB" if int(size) < 2**20 else f"{int(size) >> 20} MB"
        axis.annotate(f"{of}: {rate:.0f} GB/s", (low, low * rate), fontsize=6, color="#777777")
    axis.axhline(best, color="black", linewidth=1, label=f"best rate seen, {best:.0f} GFLOP/s")
    groups = list(dict.fromkeys(case["group"] for case in cases))
    for group, colour in zip(groups, [OURS, *OTHERS * len(groups)], strict=False):
        of_group = [(x, case) for x, case in zip(intensities, cases, strict=True) if case["group"] == group]
        reached = [case["work"]["flops"] / case["contenders"]["fastmeta"]["median_ms"] * 1e-6 for _, case in of_group]
        axis.plot([x for x, _ in of_group], reached, "o", color=colour, markersize=5, label=group)
    axis.set(xscale="log", yscale="log", xlabel="FLOPs a byte at least", ylabel="GFLOP/s of the least FLOPs")
    axis.set_title(_head(report), fontsize=9)
    axis.legend(fontsize=7, frameon=False)
    return figure
