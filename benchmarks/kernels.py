"""`python -m benchmarks.kernels`: where a GPU's time goes in MAML's meta-gradient.

For every workload of the `maml` group the time of a call as Python makes it, replayed from a CUDA graph (what is left
without Python and launches), and kernel by kernel.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from fastmeta.dispatch.spec import Make

from . import measure, roofline, suite
from .contenders import in_cuda_graph

ROUNDS = 5  # of a profile
MOST = 12  # kernels listed


def kernels(run: Callable[[], object]) -> Iterator[tuple[str, float, float]]:
    """(name, launches, microseconds) a call, longest first."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(ROUNDS):
            run()
        torch.cuda.synchronize()
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_device_time_total)
    for event in events[:MOST]:
        if event.self_device_time_total > 0:
            yield event.key, event.count / ROUNDS, event.self_device_time_total / ROUNDS


def report(seconds: float) -> Iterator[str]:
    """Lines of Markdown."""
    machine, peak = roofline.machine(), roofline.Peak("cuda")
    peak.look()
    yield (
        f"{machine['gpu']}, torch {machine['torch']}, float32; {peak.words()}. Medians of interleaved rounds, in "
        "microseconds."
    )
    for case in suite.GROUPS["maml"](Make(torch.float32, "cuda")):
        if case.name.endswith("CUDA graph"):
            continue
        eager = {name: run for name, run in {**case.contenders, **case.yardsticks}.items() if name in suite.GRAPHED}
        measure.check_equal({name: run for name, run in eager.items() if name in case.contenders})
        runs = {**eager, **{f"{name}, CUDA graph": in_cuda_graph(run) for name, run in eager.items()}}
        yield f"\n## {case.name}\n\n| what | us |\n|---|---|"
        for name, times in measure.interleaved(runs, seconds).items():
            yield f"| {name} | {statistics.median(times) * 1e6:.1f} |"
        yield "\n| kernel of fastmeta | launches | us |\n|---|---|---|"
        for name, launches, us in kernels(eager["fastmeta"]):
            yield f"| `{name[:90]}` | {launches:.0f} | {us:.1f} |"


def main(
    seconds: Annotated[float, typer.Option(help="time per workload")] = 1.0,
    out: Annotated[Path | None, typer.Option(help="folder for kernels.md; not written without it")] = None,
) -> None:
    """Where a GPU's time goes in MAML's meta-gradient."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("needs a CUDA device")
    lines = []
    for line in report(seconds):
        print(line, flush=True)
        lines.append(line)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "kernels.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    typer.run(main)
