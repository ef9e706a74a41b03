"""`fastmeta reproduce`: one table of every algorithm, trained and judged alike, beside the published figures.

Each row is a run of its own under `OUT/SUITE/ROW`; a row that has been judged is not run again, and one that was cut
off goes on from its checkpoint, so the command can be stopped and typed again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from .. import values
from ..algorithms import NearestNeighbour
from ..irl.experiment import WORLDS, experiment
from ..training import CheckpointFolder, evaluate, run_config
from ..training.registry import ALGORITHMS
from ..training.reporting import ConsoleReporter
from ..training.run import build_algorithm, build_tasks, build_trainer, find_checkpoint, load_for_evaluation, prepare
from . import cross_domain
from ._results import machine, once, write


@dataclass(frozen=True)
class Row:
    """One line of the table: an algorithm on a data set.

    `options` of `fastmeta train` make it fit the suite; `published` is the figure for the same tasks, with its source.
    """

    algorithm: str
    data: str
    options: Mapping[str, Any] = field(default_factory=dict)
    published: str = ""
    label: str = ""

    @property
    def name(self) -> str:
        return f"{self.label or self.algorithm}-{self.data}"


# a few minutes on one core: a small encoder, few tasks a step, and a rate that falls to nothing
_QUICK = {"lr_schedule": "cosine"}
_SINE = {**_QUICK, "outer_lr": 2e-3}
_CONV = {**_QUICK, "hidden": (32,), "outer_lr": 2e-3}
_WAYS = {**_CONV, "train_ways": 20, "train_query_shots": 3, "task_batch": 2}
_FIVE = {**_CONV, "train_ways": 5, "train_query_shots": 4, "task_batch": 5}
# the perceptron of Finn et al. 2017 and the split of theirs, 1,200 characters drawn at random
_MLP = {"model": "mlp", "norm": "batch", "partition": "1200"}
_QUICK_MLP = {**_QUICK, **_MLP, "outer_lr": 5e-3}


def _quick(images: str) -> tuple[Row, ...]:
    return (
        Row("maml", "sinusoid", {**_SINE, "iterations": 20_000}, "0.77 (Li et al. 2017, table 1)"),
        Row("metasgd", "sinusoid", {**_SINE, "iterations": 20_000}, "0.53 (Li et al. 2017, table 1)"),
        Row("maml++", "sinusoid", {**_SINE, "iterations": 20_000}),
        Row("cavia", "sinusoid", {**_SINE, "iterations": 20_000}, "0.19 (Zintgraf et al. 2019, 5 context parameters)"),
        Row("anil", "sinusoid", {**_SINE, "iterations": 15_000}),
        Row("boil", "sinusoid", {**_SINE, "iterations": 15_000}),
        Row("reptile", "sinusoid", {**_SINE, "iterations": 4_000}),
        Row("imaml", "sinusoid", {**_SINE, "inner_lr": 5e-3, "outer_lr": 1e-3, "task_batch": 25, "iterations": 2_500}),
        Row("ridge", "sinusoid", {**_SINE, "iterations": 15_000}),
        Row("hypernetwork", "sinusoid", {**_SINE, "iterations": 12_000}),
        Row("protonet", images, {**_WAYS, "iterations": 2_400}, "98.8 (Snell et al. 2017, table 1)"),
        Row("matching", images, {**_WAYS, "iterations": 3_000}, "98.1 (Vinyals et al. 2016, table 1)"),
        Row("relation", images, {**_FIVE, "iterations": 2_500}, "99.6 (Sung et al. 2018, table 1)"),
        Row("ridge", images, {**_WAYS, "iterations": 2_800}, "98.9 (Bertinetto et al. 2019)"),
        Row("gradient-head", images, {**_WAYS, "iterations": 2_400}),
        Row("hypernetwork", images, {**_WAYS, "iterations": 3_000}, "99.7 (VERSA, Gordon et al. 2019, table 1)"),
        Row("modulated-protonet", images, {**_WAYS, "iterations": 1_600}),
        Row("caml-conditional", images, {**_CONV, "task_batch": 4, "iterations": 1_500}),
        Row(
            "caml-incontext", images,
            {**_CONV, "iterations": 3_000,
             "settings": (("code_width", 32), ("feedforward", 128), ("heads", 4))},
        ),
        Row("maml", images, {**_QUICK_MLP, "iterations": 7_500}, "89.7 (Finn et al. 2017, table 1)", "maml-mlp"),
        Row("anil", images, {**_CONV, "task_batch": 4, "iterations": 3_000}, label="anil-conv"),
        Row(
            "contrastive", images, {**_QUICK, "hidden": (32,), "outer_lr": 3e-3, "iterations": 1_200},
            "88.0 (ProtoTransfer, Medina et al. 2020)",
        ),
        Row(
            "protonet", images,
            {**_WAYS, "iterations": 1_200, "labels": "cluster", "cluster_checkpoint": "contrastive"},
            "68.1 (CACTUs-ProtoNets, Hsu et al. 2019)", "cactus-protonet",
        ),
        Row(
            "maml", images, {**_QUICK_MLP, "iterations": 3_000, "labels": "augment"},
            "83.8 (UMTRA, Khodadadeh et al. 2019)", "umtra-maml-mlp",
        ),
    )  # fmt: skip


def _paper(images: str) -> tuple[Row, ...]:
    """What differs from the defaults of `fastmeta train`, which are the papers' settings."""
    kept = ("model", "norm", "partition", "labels", "cluster_checkpoint")
    return tuple(
        dataclasses.replace(row, options={name: row.options[name] for name in kept if name in row.options})
        for row in _quick(images)
    )


def _smoke(images: str) -> tuple[Row, ...]:
    small = {"task_batch": 2, "iterations": 3, "eval_tasks": 4}
    return tuple(dataclasses.replace(row, options={**row.options, **small}) for row in _quick(images))


CROSS_DOMAIN = "cross-domain"
SUITES: Mapping[str, Callable[[str], tuple[Row, ...]]] = {"quick": _quick, "paper": _paper, "smoke": _smoke}


def reproduce(
    suite: str,
    out: Path,
    *,
    only: list[str] | None = None,
    episodes: int | None = None,
    threads: int | None = None,
    data_root: str | None = None,
    device: str = "auto",
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Run what has no result yet; write and return the table.

    Args:
        suite: "quick", "paper", "smoke" or "cross-domain" (`fastmeta.cli.cross_domain`).
        out: folder of the runs and of `SUITE/table.json` and `SUITE/table.md`.
        only: names of rows to run, such as "protonet-omniglot"; others are left as they are.
        episodes: held-out tasks that each row is judged on, in each domain of cross-domain; by default 600, there 200.
            A row that was judged on another number runs again.
        threads, data_root, device: as of `fastmeta train`.
        console: where progress is shown; None: nowhere.

    Raises:
        ValueError: an unknown suite or row.
    """
    images = "omniglot" if data_root or os.environ.get("FASTMETA_DATA") else "glyphs"
    values.choice("suite", suite, (*SUITES, CROSS_DOMAIN))
    episodes = episodes or (cross_domain.EPISODES if suite == CROSS_DOMAIN else 600)
    common = {"threads": threads, "data_root": data_root, "device": device}
    console = console or Console(quiet=True)
    folder = Path(out) / suite
    folder.mkdir(parents=True, exist_ok=True)
    tell, ranked, table = describe, list, markdown
    if suite == CROSS_DOMAIN:
        root = data_root or os.environ.get("FASTMETA_DATA")
        if root is None:
            raise ValueError(f"suite {suite} needs real data: name their folder by data_root or FASTMETA_DATA")
        given = {"threads": threads, "device": device}
        runs: dict[str, Callable] = cross_domain.rows(root, episodes=episodes, common=given)
        tell, ranked, table = cross_domain.describe, cross_domain.ranked, cross_domain.markdown
    else:
        runs = {row.name: partial(_run, row, episodes=episodes, common=common, console=console)
                for row in SUITES[suite](images)}  # fmt: skip
        for rule in PIXELS:
            runs[f"{rule}-{images}"] = partial(_pixels, rule, images, episodes=episodes, common=common)
        for world in WORLDS:
            iterations = IRL_ITERATIONS[suite]
            runs[f"irl-{world}"] = partial(_irl, world, iterations=iterations, episodes=episodes, common=common)
    unknown = set(only or ()) - runs.keys()
    if unknown:
        raise ValueError(f"rows are {', '.join(runs)}; got {', '.join(sorted(unknown))}")
    results = []
    for name, run in runs.items():
        wanted = not only or name in only
        result = once(folder / name / "result.json", run if wanted else None, {"episodes": episodes})
        if result is None:
            if not wanted:
                continue
            console.print(f"{name}: stopped; the same command goes on with it")
            break
        results.append(result | {"name": name})
        console.print(f"{name}: {tell(results[-1])}", highlight=False)
    results = ranked(results)
    write(folder / "table.json", json.dumps(results, indent=1) + "\n")
    write(folder / "table.md", table(results))
    return results


def _run(row: Row, folder: Path, *, episodes: int, common: dict[str, Any], console: Console) -> dict[str, Any] | None:
    given = {key: value for key, value in common.items() if value is not None}
    options = {"eval_tasks": 200, **row.options, **given}
    if "cluster_checkpoint" in options:  # names the row whose encoder sees the images
        options["cluster_checkpoint"] = str(folder.parent / f"{options['cluster_checkpoint']}-{row.data}")
    config = run_config(row.algorithm, row.data, **options)
    if "eval_every" not in row.options and config.iterations:
        # the best of few checkpoints counts: judging one takes as long as many a step
        config = dataclasses.replace(config, eval_every=-(-config.iterations // 4), save_every=1000)
    bar = ConsoleReporter(console, iterations=config.iterations, minutes=None, regression=config.regression)
    checkpoints = CheckpointFolder(folder)
    begin = partial(build_trainer, config, folder, (bar,))
    goes_on = checkpoints.steps()
    trainer = checkpoints.newest(fall_back=True, use=lambda found: begin(resume=found))[0] if goes_on else begin()
    console.print(f"{row.name}: {ALGORITHMS[row.algorithm].summary}", highlight=False)
    with bar:
        if trainer.run() is not None:
            return None
    _, algorithm, tasks = load_for_evaluation(
        find_checkpoint(folder), "test", device=config.device, threads=config.threads, data_root=config.data_root
    )
    steps = config.eval_inner_steps if hasattr(algorithm, "inner_steps") else None
    found = evaluate(algorithm, tasks, episodes=episodes, inner_steps=steps)
    blank = build_algorithm(config, tasks, trainer.device)
    untrained = evaluate(blank, tasks, episodes=min(episodes, 200), inner_steps=steps)
    return {
        "summary": ALGORITHMS[row.algorithm].summary,
        **found.as_json(),
        "untrained": untrained.as_json(),
        "steps": trainer.step,
        "minutes": trainer.seconds / 60,
        "tasks_per_second": trainer.step * config.task_batch / max(trainer.seconds, 1e-9),
        "published": row.published,
        "config": config.as_json() | {"data_root": None, "cluster_checkpoint": row.options.get("cluster_checkpoint")},
        **machine(trainer.device),
    }


# nearest neighbour without any training: what every other row has to beat
PIXELS = {
    "pixels": {},
    "pixels-centred": {"centre": "support", "normalise": True},
}


def _pixels(rule: str, images: str, folder: Path, *, episodes: int, common: dict[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in common.items() if value is not None}
    config = run_config("protonet", images, **given)
    tasks = build_tasks(config, "test", prepare(config))
    began = time.perf_counter()
    found = evaluate(NearestNeighbour(nn.Flatten(), **PIXELS[rule]), tasks, episodes=episodes)
    seconds = time.perf_counter() - began
    what = "nearest neighbour on pixels" + (", centred and of unit length" if PIXELS[rule] else "")
    return {
        "summary": what, **found.as_json(), "steps": 0, "minutes": seconds / 60, "tasks_per_second": episodes / seconds,
        "published": "", **machine(prepare(config)),
    }  # fmt: skip


# outer steps of reward learning, for which no paper has a setting: the tasks are our own
IRL_ITERATIONS = {"quick": 600, "paper": 10_000, "smoke": 2}


def _irl(world: str, folder: Path, *, iterations: int, episodes: int, common: dict[str, Any]) -> dict[str, Any]:
    if common["threads"]:
        torch.set_num_threads(common["threads"])
    named = common["device"]
    device = torch.device(named if named != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    began = time.perf_counter()
    rows = experiment(world, iterations=iterations, num_tasks=min(episodes, 200), device=str(device))
    seconds = time.perf_counter() - began
    return {
        "summary": "rewards from demonstrations: value difference, 0 best, 1 chance", "rows": rows,
        "steps": iterations, "minutes": seconds / 60, "tasks_per_second": 2 * 16 * iterations / seconds,
        "published": "", **machine(device),
    }  # fmt: skip


def describe(result: dict[str, Any]) -> str:
    """A row's figure with its interval: accuracy in per cent, or mean squared error."""
    if "rows" in result:
        few = [r for r in result["rows"] if r["demonstrations"] == 5]
        return ", ".join(f"{r['method']} {r['value_difference']['mean']:.3f}" for r in few) + " (5 demonstrations)"
    if "accuracy" in result:
        estimate = result["accuracy"]
        return f"{100 * estimate['mean']:.2f} ± {100 * estimate['ci95']:.2f} %"
    return f"MSE {result['loss']['mean']:.3f} ± {result['loss']['ci95']:.3f}"


def markdown(results: list[dict[str, Any]]) -> str:
    lines = [
        "| row | what | held-out | calibration error | untrained | published | steps | minutes | tasks/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        untrained = describe(r["untrained"]) if "untrained" in r else ""
        calibration = f"{100 * r['calibration_error']:.1f} %" if r.get("calibration_error") is not None else ""
        lines.append(
            f"| {r['name']} | {r['summary']} | {describe(r)} | {calibration} | {untrained} | {r['published']} | "
            f"{r['steps']:,} | {r['minutes']:.1f} | {r['tasks_per_second']:,.0f} |"
        )
    return "\n".join(lines) + "\n"
