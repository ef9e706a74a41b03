"""`fastmeta reproduce`: one table of every algorithm, trained and judged alike, beside the published figures.

Each row is a run of its own under `OUT/SUITE/ROW`; a row that has been judged is not run again, and one that was cut
off goes on from its checkpoint, so the command can be stopped and typed again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .algorithms import NearestNeighbour
from .training import CheckpointFolder, evaluate, run_config
from .training.registry import ALGORITHMS
from .training.run import build_algorithm, build_tasks, build_trainer, find_checkpoint, load_for_evaluation, prepare


@dataclass(frozen=True)
class Row:
    """One line of the table: an algorithm on a data set. `minutes` of training; `published` for the same tasks."""

    algorithm: str
    data: str
    minutes: float
    options: Mapping[str, Any] = field(default_factory=dict)
    published: str = ""
    label: str = ""

    @property
    def name(self) -> str:
        return f"{self.label or self.algorithm}-{self.data}"


_MLP = {"model": "mlp", "outer_lr": 3e-3}


def _suite(minutes: Callable[[float], float], images: str) -> tuple[Row, ...]:
    return (
        Row("maml", "sinusoid", minutes(4), published="0.77 (Li et al. 2017, table 1: 10 shot)"),
        Row("metasgd", "sinusoid", minutes(4), published="0.53 (Li et al. 2017, table 1: 10 shot)"),
        Row("anil", "sinusoid", minutes(2), {"inner_lr": 0.01}),
        Row("boil", "sinusoid", minutes(2), {"inner_lr": 0.01}),
        Row("maml++", "sinusoid", minutes(4)),
        Row("cavia", "sinusoid", minutes(4), published="0.19 (Zintgraf et al. 2019: 5 context parameters)"),
        Row("reptile", "sinusoid", minutes(3)),
        Row("imaml", "sinusoid", minutes(3)),
        Row("ridge", "sinusoid", minutes(2)),
        Row("hypernetwork", "sinusoid", minutes(4)),
        Row("protonet", images, minutes(8), {"hidden": (32,)}, "98.8 (Snell et al. 2017, table 1)"),
        Row("matching", images, minutes(6), {"hidden": (32,)}, "98.1 (Vinyals et al. 2016, table 1)"),
        Row("relation", images, minutes(6), {"hidden": (32,), "train_ways": 20}, "99.6 (Sung et al. 2018, table 1)"),
        Row("ridge", images, minutes(6), {"hidden": (32,), "train_ways": 20}, "98.9 (Bertinetto et al. 2019)"),
        Row("hypernetwork", images, minutes(6), {"hidden": (32,)}, "99.7 (VERSA, Gordon et al. 2019, table 1)"),
        Row("caml-modulation", images, minutes(6), {"hidden": (32,)}),
        Row("caml-incontext", images, minutes(6), {"hidden": (32,)}),
        Row("maml", images, minutes(8), _MLP, "89.7 (Finn et al. 2017, table 1: no convolutions)", "maml-mlp"),
        Row("metasgd", images, minutes(4), _MLP, label="metasgd-mlp"),
        Row("anil", images, minutes(4), _MLP, label="anil-mlp"),
        Row("boil", images, minutes(4), _MLP, label="boil-mlp"),
    )


def suites(images: str) -> dict[str, tuple[Row, ...]]:
    """`quick`: at most 90 minutes on two CPU cores. `paper`: the papers' own lengths, for a GPU. `smoke`: seconds."""
    full = tuple(
        Row(
            row.algorithm,
            row.data,
            0,
            {k: v for k, v in row.options.items() if k != "hidden"},
            row.published,
            row.label,
        )
        for row in _suite(lambda m: m, images)
    )
    return {
        "quick": _suite(lambda m: m, images),
        "paper": full,
        "smoke": _suite(lambda m: 0.02, images),
    }


def reproduce(
    suite: str,
    out: Path,
    *,
    only: list[str] | None = None,
    episodes: int = 600,
    threads: int | None = None,
    data_root: str | None = None,
    device: str = "auto",
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Run what has no result yet; write and return the table.

    Args:
        suite: "quick", "paper" or "smoke".
        out: folder of the runs and of `SUITE.json` and `SUITE.md`.
        only: names of rows to run, such as "protonet-omniglot"; others are left as they are.
        say: takes a line for each row that ends.

    Raises:
        ValueError: an unknown suite or row.
    """
    images = "omniglot" if data_root or os.environ.get("FASTMETA_DATA") else "glyphs"
    known = suites(images)
    if suite not in known:
        raise ValueError(f"suite must be one of {', '.join(known)}; got {suite!r}")
    rows = known[suite]
    unknown = set(only or ()) - {row.name for row in rows}
    if unknown:
        raise ValueError(f"rows are {', '.join(row.name for row in rows)}; got {', '.join(sorted(unknown))}")
    folder = Path(out) / suite
    common = {"threads": threads, "data_root": data_root, "device": device}
    results = []
    for row in rows:
        path = folder / row.name / "result.json"
        if not path.exists():
            if only and row.name not in only:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            result = _run(row, path.parent, episodes, common)
            if result is None:
                say(f"{row.name}: stopped; the same command goes on with it")
                break
            partial = path.with_suffix(".part")
            partial.write_text(json.dumps(result, indent=1) + "\n")
            partial.replace(path)
        results.append(json.loads(path.read_text()))
        say(f"{row.name}: {describe(results[-1])}")
    results += _baselines(images, folder, episodes, common) if not only else []
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "table.md").write_text(markdown(results))
    return results


def _run(row: Row, folder: Path, episodes: int, common: dict[str, Any]) -> dict[str, Any] | None:
    # the best checkpoint counts, so every run is validated some ten times
    options = dict(row.options) | {"eval_tasks": 300}
    if row.minutes:
        options |= {"minutes": row.minutes, "iterations": 1_000_000, "eval_every": 500}
    config = run_config(row.algorithm, row.data, **options, **common)
    trainer = build_trainer(config, folder)
    checkpoints = CheckpointFolder(folder)
    if checkpoints.steps():
        trainer.restore(checkpoints.newest(fall_back=True)[0])
    if trainer.run() is not None:
        return None
    _, algorithm, tasks = load_for_evaluation(
        find_checkpoint(folder), "test", device=common["device"], threads=common["threads"],
        data_root=common["data_root"],
    )  # fmt: skip
    has_loop = hasattr(algorithm, "inner_steps")
    found = evaluate(algorithm, tasks, episodes=episodes, inner_steps=config.eval_inner_steps if has_loop else None)
    untrained = evaluate(
        build_algorithm(config, tasks, trainer.device), tasks, episodes=episodes,
        inner_steps=config.eval_inner_steps if has_loop else None,
    )  # fmt: skip
    return {
        "name": row.name,
        "summary": ALGORITHMS[row.algorithm].summary,
        **found.as_json(),
        "untrained": untrained.as_json(),
        "steps": trainer.step,
        "minutes": trainer.seconds / 60,
        "tasks_per_second": trainer.step * config.task_batch / max(trainer.seconds, 1e-9),
        "published": row.published,
        "device": str(trainer.device),
        "threads": torch.get_num_threads(),
        "episodes": episodes,
    }


def _baselines(images: str, folder: Path, episodes: int, common: dict[str, Any]) -> list[dict[str, Any]]:
    """Nearest neighbour on pixels, which no training made better."""
    config = run_config("protonet", images, **common)
    tasks = build_tasks(config, "test", prepare(config))
    began = time.perf_counter()
    found = evaluate(_Pixels(), tasks, episodes=episodes)
    seconds = time.perf_counter() - began
    return [
        {
            "name": f"pixels-{images}", "summary": "nearest neighbour on pixels", **found.as_json(), "steps": 0,
            "minutes": seconds / 60, "tasks_per_second": episodes / seconds, "published": "", "episodes": episodes,
        }
    ]  # fmt: skip


class _Pixels(NearestNeighbour):
    """The nearest-neighbour classifier on flattened images; evaluation asks for a parameter's device."""

    def __init__(self):
        super().__init__(nn.Flatten())
        self.device_marker = nn.Parameter(torch.zeros(()), requires_grad=False)


def describe(result: dict[str, Any]) -> str:
    """A row's figure with its interval: accuracy in per cent, or mean squared error."""
    if "accuracy" in result:
        estimate = result["accuracy"]
        return f"{100 * estimate['mean']:.2f} ± {100 * estimate['ci95']:.2f} %"
    return f"MSE {result['loss']['mean']:.3f} ± {result['loss']['ci95']:.3f}"


def markdown(results: list[dict[str, Any]]) -> str:
    lines = [
        "| row | what | held-out | untrained | published | steps | minutes | tasks/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        untrained = describe(r["untrained"]) if "untrained" in r else ""
        lines.append(
            f"| {r['name']} | {r['summary']} | {describe(r)} | {untrained} | {r['published']} | {r['steps']:,} | "
            f"{r['minutes']:.1f} | {r['tasks_per_second']:,.0f} |"
        )
    return "\n".join(lines) + "\n"
