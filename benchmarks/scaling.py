"""`python -m benchmarks.scaling`: a model of a training step on many GPUs, and how well such a model foretells this
machine's processes. Writes the tables of docs/scaling.md, which explains it.

A step is that of `fastmeta.training`: every rank draws the whole batch and gathers its own tasks' rows, finds their
meta-gradient, sums it over the ranks together with each task's loss and accuracy, and moves the weights; now and then
rank 0 writes a checkpoint. Nothing overlaps with the sum: a meta-gradient is whole at its end.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastmeta.nn
from fastmeta.tasks import SinusoidTasks
from fastmeta.training import Trainer

from . import counts
from .problems import maml_batch
from .report import table

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
MODEL, MEASURED = "<!-- model: python -m benchmarks.scaling -->", "<!-- measured: python -m benchmarks.scaling -->"
END = "<!-- end of what the command wrote -->"
RANKS = (1, 8, 16, 64, 256, 1000)
HERE = (1, 2, 4)  # processes


@dataclass(frozen=True)
class Cluster:
    """What a rank and the wires between ranks can do, in seconds, bytes and FLOP/s."""

    flops: float = 67e12  # float32 without tensor cores: H100 and H200 SXM, NVIDIA's data sheets
    memory: float = 3.35e12  # bytes a second: H100 SXM; 4.8e12 on an H200
    reached_memory: float = 0.8  # of that, assumed
    launch: float = 20e-6  # the host's time for an op called from Python, assumed
    per_node: int = 8  # as in a DGX H100
    inside: tuple[float, float] = (3e-6, 450e9)  # NVLink: latency assumed; 900 GB/s in both directions, data sheet
    between: tuple[float, float] = (8e-6, 50e9)  # a rank's InfiniBand NDR: latency assumed; 400 Gb/s, data sheet
    disk: float = 1e9  # bytes a second that rank 0 writes, assumed
    jitter: float = 0.02  # standard deviation of a rank's time over the time, assumed


@dataclass(frozen=True)
class Work:
    """What a task and a step ask for."""

    name: str
    flops: float  # a task
    bytes: float  # that a task moves to and from memory
    rows: float  # bytes of a task's rows
    drawn: float  # bytes moved to draw a task, on every rank
    parameters: int
    ops: int  # calls of a step, on the host
    reached: float  # of the arithmetic rate
    weak: int  # tasks of a rank, where each rank has as many
    strong: int  # tasks in all, where ranks share them
    steps_of_checkpoint: int = 1000


def step(work: Work, tasks: int, ranks: int, cluster: Cluster) -> dict[str, float]:
    """Seconds of a step's parts, with `tasks` on each rank; what the host does goes on beside what the device does."""
    memory, whole = cluster.reached_memory * cluster.memory, tasks * ranks
    gradient = tasks * max(work.flops / (work.reached * cluster.flops), work.bytes / memory)
    sampling = (whole * work.drawn + 2 * tasks * work.rows) / memory
    # the slowest of many: about the expected largest of as many normal numbers
    waits = cluster.jitter * math.sqrt(2 * math.log(ranks))
    return {
        "sampling": sampling,
        "gradient": gradient,
        "host": max(0.0, work.ops * cluster.launch - sampling - gradient),  # what the device waits for
        "slowest": waits * max(sampling + gradient, work.ops * cluster.launch),
        "all-reduce": all_reduce(4 * (work.parameters + 2 * whole), ranks, cluster),
        "optimiser": 7 * 4 * work.parameters / memory,  # Adam reads four numbers of a weight and writes three
        "checkpoint": 3 * 4 * work.parameters / cluster.disk / work.steps_of_checkpoint,  # two moments too; all wait
    }


def all_reduce(nbytes: float, ranks: int, cluster: Cluster) -> float:
    """Inside each node a ring; between nodes a ring or a tree, whichever is quicker, each rank with its own share."""
    inside = min(ranks, cluster.per_node)
    nodes = math.ceil(ranks / cluster.per_node)
    latency, rate = cluster.inside
    seconds = ring(nbytes, inside, latency, rate)
    if nodes > 1:
        latency, rate = cluster.between
        share = nbytes / inside
        seconds += min(ring(share, nodes, latency, rate), tree(share, nodes, latency, rate))
    return seconds


def ring(nbytes: float, ranks: int, latency: float, rate: float) -> float:
    """Reduce-scatter, then all-gather: `2 (n - 1)` messages of an n-th each."""
    return 2 * (ranks - 1) * (latency + nbytes / ranks / rate)


def tree(nbytes: float, ranks: int, latency: float, rate: float) -> float:
    """Up and down a binary tree, in pieces that follow each other: depth in latencies, the whole twice over a wire."""
    return 2 * (math.ceil(math.log2(ranks)) * latency + nbytes / rate) if ranks > 1 else 0.0


# the three workloads -------------------------------------------------------------------------------------------------
def works() -> Iterator[Work]:
    """A perceptron, Conv4 and ResNet-12, second order."""
    sizes, rows, queries = (1, 40, 40, 1), 10, 10
    parameters, of_rows = sum(i * o + o for i, o in zip(sizes[:-1], sizes[1:], strict=True)), 4 * 2 * (rows + queries)
    yield Work(
        "sinusoid MLP 1-40-40-1, K = 1", counts.maml(sizes, 1, rows, queries, 1), of_rows + 4 * parameters, of_rows,
        5 * of_rows, parameters, 40, 0.05, weak=10_000, strong=100_000,
    )  # fmt: skip
    conv4 = fastmeta.nn.conv4(1, 64, num_classes=5, image_size=28, track_running_stats=False)
    yield _of_images("Conv4-64, 28x28, 5-way 1-shot, K = 5", conv4, (1, 28, 28), 5, weak=16, strong=1024)
    encoder = fastmeta.nn.resnet12(3, (64, 128, 256, 512), track_running_stats=False)
    resnet = nn.Sequential(encoder, nn.Linear(512, 5))
    yield _of_images("ResNet-12, 84x84, 5-way 1-shot, K = 1", resnet, (3, 84, 84), 1, weak=4, strong=256)


def _of_images(name: str, model: nn.Module, shape: tuple[int, ...], steps: int, *, weak: int, strong: int) -> Work:
    """Five support images, 75 queries. An inner step is nine forward passes (two gradients, and in the sweep a
    Hessian-vector product: twice the three again), the query pass three."""
    model, image = model.to("meta"), torch.empty(2, *shape, device="meta")
    moved: list[int] = []
    leaves = [layer for layer in model.modules() if not list(layer.children())]
    for layer in leaves:
        layer.register_forward_hook(lambda module, given, output: moved.append(given[0].numel() + output.numel()))
    with FlopCounterMode(display=False) as counter:
        model(image)
    passes = 9 * steps * 5 + 3 * 75
    return Work(
        name, passes * counter.get_total_flops() / 2, passes * 4 * sum(moved) / 2, 80 * 5 * math.prod(shape),
        # places, eight bytes each, compared with those drawn before: 16 of each of five classes
        5 * 8 * (16 * 16 / 2 + 4 * 16), sum(p.numel() for p in model.parameters()),
        12 * len(leaves) * (steps + 1) + 6 * (5 + 16) + 20, 0.3, weak, strong,
    )  # fmt: skip


def scaled(work: Work, ranks: int, strong: bool, cluster: Cluster) -> tuple[dict[str, float], float]:
    """Parts of a step, and its efficiency: time alone over time, by as many ranks where they share the tasks."""
    tasks = math.ceil(work.strong / ranks) if strong else work.weak
    parts = step(work, tasks, ranks, cluster)
    alone = sum(step(work, work.strong if strong else work.weak, 1, cluster).values())
    return parts, alone / sum(parts.values()) / (ranks if strong else 1)


def bend(work: Work, strong: bool, cluster: Cluster, up_to: int = 4096) -> int | None:
    """The number of ranks from which on less than half of each is used; None if that is beyond `up_to`."""
    return next((n for n in range(2, up_to + 1) if scaled(work, n, strong, cluster)[1] < 0.5), None)


def of_model(cluster: Cluster) -> list[str]:
    """The tables of the page: for each workload weak and strong scaling, parts of a step, and where it bends."""
    lines: list[str] = []
    for work in works():
        lines += [
            f"**{work.name}**: {work.flops:.3g} FLOPs and {work.bytes:.3g} bytes a task, {work.parameters:,} "
            f"parameters, {work.reached:.0%} of the arithmetic rate, {work.ops} calls a step.",
            "",
        ]
        for strong in (False, True):
            title = f"sharing {work.strong:,} tasks" if strong else f"{work.weak:,} tasks each"
            shown = ("sampling", "gradient", "host", "slowest", "all-reduce")
            rows = []
            for ranks in RANKS:
                parts, efficiency = scaled(work, ranks, strong, cluster)
                cells = (sum(parts.values()), *(parts[part] for part in shown))
                rows.append((f"{ranks:,}", f"{efficiency:.0%}", *(f"{cell * 1e3:.3g}" for cell in cells)))
            lines += table((f"GPUs, {title}", "efficiency", "step ms", *shown), rows)
            at = bend(work, strong, cluster)
            where = f"from {at:,} GPUs on" if at else "nowhere up to 4,096"
            lines += ["", f"Less than half of each is used {where}.", ""]
    return lines[:-1]


# processes of this machine -------------------------------------------------------------------------------------------
TASKS = 4000  # of sinusoids, for each process
PARAMETERS = 1761
REPEATS = 20


def _process(rank: int, ranks: int, store: str) -> None:
    """A process of `measure`: prints what it measured, as JSON, if it is the first."""
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)

    def median(run) -> float:
        times = []
        for _ in range(REPEATS + 3):
            if ranks > 1:
                dist.barrier()
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        return statistics.median(times[3:])

    model, _, batch, maml = maml_batch((1, 40, 40, 1), TASKS, 10, 10, 1)
    source = SinusoidTasks()
    trainer = Trainer(maml, source, task_batch=ranks * TASKS, iterations=10**6, eval_every=0, save_every=0)
    small, large = torch.zeros(PARAMETERS), torch.zeros(4_000_000)
    found = {"gradient": median(lambda: maml.gradients(batch)), "sampling": median(lambda: source.sample(TASKS))}
    for name, tensor in (("small", small), ("large", large)):
        found[name] = median(lambda tensor=tensor: dist.all_reduce(tensor)) if ranks > 1 else 0.0
    found["step"] = median(trainer.train_step)
    if rank == 0:
        print(json.dumps(found))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def measure() -> list[dict]:
    """A row for 1, 2 and 4 processes of a thread each: what the model foretells from one process and from two
    all-reduces between two, and what a step takes."""
    found = {}
    for ranks in HERE:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", f"{__package__}.scaling"]
            command += ["--ranks", str(ranks), "--store", f"{folder}/store"]
            others = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(1, ranks)]
            first = subprocess.run([*command, "--rank", "0"], check=True, capture_output=True, text=True)
            if any(other.wait() for other in others):
                raise RuntimeError("a process failed")
        found[ranks] = json.loads(first.stdout.splitlines()[-1])
    return foretold(found, os.cpu_count() or 1)


def foretold(found: dict[int, dict[str, float]], cores: int) -> list[dict]:
    """The model with this machine's figures: a gradient and a draw of one process, latency and rate of wires from
    all-reduces of 7 kB and 16 MB between two. More processes than cores take turns."""
    one, two = found[1], found[2]
    small = 4 * PARAMETERS
    per_byte = max(two["large"] - two["small"], 1e-9) / (4 * 4_000_000 - small)
    latency = max(two["small"] / 2 - small / 2 * per_byte, 1e-9)
    rest = max(0.0, one["step"] - one["gradient"] - one["sampling"])  # optimiser, checks
    rows = []
    for ranks, measured in found.items():
        turns = max(1.0, ranks / cores)
        alone = one["gradient"] + ranks * one["sampling"] + rest  # every process draws the whole batch
        summed = ring(small + 8 * ranks * TASKS, ranks, latency, 1 / per_byte)
        rows.append({
            "processes": ranks, "tasks": ranks * TASKS, "model": turns * (alone + summed), "measured": measured["step"],
        })  # fmt: skip
    return rows


def of_measured(rows: list[dict]) -> list[str]:
    heads = ("processes", "tasks a step", "model ms", "measured ms", "measured / model", "tasks/s", "efficiency")
    first = rows[0]["tasks"] / rows[0]["measured"]
    lines = (
        (
            str(r["processes"]), f"{r['tasks']:,}", f"{r['model'] * 1e3:.2f}", f"{r['measured'] * 1e3:.2f}",
            f"{r['measured'] / r['model']:.2f}", f"{r['tasks'] / r['measured']:,.0f}",
            f"{r['tasks'] / r['measured'] / first / r['processes']:.0%}",
        )
        for r in rows
    )  # fmt: skip
    return table(heads, lines)


def written(text: str, begin: str, lines: list[str]) -> str:
    """A page with its lines between `begin` and `END` made anew."""
    before, rest = text.split(begin)
    return before + "\n".join([begin, "", *lines, "", END]) + rest.split(END, 1)[1]


def main(
    measured: Annotated[bool, typer.Option("--measure", help="1, 2 and 4 processes here too: a minute")] = False,
    page: Annotated[bool, typer.Option(help="write the tables of docs/scaling.md")] = False,
    h200: Annotated[bool, typer.Option("--h200", help="an H200's memory, for a look; not for the page")] = False,
    rank: Annotated[int, typer.Option(hidden=True)] = -1,
    ranks: Annotated[int, typer.Option(hidden=True)] = 1,
    store: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """A model of a meta-step on 1 to 1,000 GPUs."""
    if rank >= 0:
        _process(rank, ranks, store)
        return
    if page and h200:
        raise typer.BadParameter("the page has an H100")
    parts = {MODEL: of_model(replace(Cluster(), memory=4.8e12) if h200 else Cluster())}
    if measured:
        parts[MEASURED] = of_measured(measure())
    text = PAGE.read_text() if page else ""
    for begin, lines in parts.items():
        print("\n".join(lines))
        text = written(text, begin, lines) if page else text
    if page:
        PAGE.write_text(text)


if __name__ == "__main__":
    typer.run(main)
