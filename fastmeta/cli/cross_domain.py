"""`fastmeta reproduce --suite cross-domain`: trained on some domains, judged on domains that were never seen.

Every learner trains for the same time on tasks of all training domains, and is judged on the same tasks of every other.
Of the domains that nothing was trained on, each ranks the learners; the table is in the order of their mean ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ..algorithms import NearestNeighbour
from ..tasks import EpisodeSampler, MixedTasks, TaskSource
from ..tasks.domains import KINDS, Domains, domains
from ..training import RunConfig, Trainer, evaluate, run_config
from ..training.registry import ALGORITHMS
from ..training.run import build_algorithm, prepare
from ._results import once, write

WAYS, SHOTS, QUERIES = 5, 1, 10
NAMES = tuple(name for name in ALGORITHMS if name != "contrastive")  # which has no use for labels
UNTRAINED = "nearest"  # neighbour on centred numbers of unit length: what every other row has to beat
_MANY = {"train_ways": 10, "train_query_shots": 5, "task_batch": 4}
_MODELS = {
    "pictures": {"model": "conv4", "hidden": (32,), "minutes": 1.0},
    "vectors": {"model": "mlp", "hidden": (128, 64), "minutes": 0.4},
}


def rows() -> list[str]:
    return [f"{name}-{kind}" for kind in KINDS for name in (*NAMES, UNTRAINED)]


def cross_domain(
    folder: Path,
    data_root: str,
    *,
    only: list[str] | None,
    episodes: int,
    minutes: float | None = None,
    console: Console,
    **common: Any,
) -> list[dict[str, Any]]:
    """Run what has no result yet; write and return the tables' rows.

    Args:
        folder: where `ROW/result.json`, `table.json` and `table.md` go.
        data_root: folder of the data sets; see `fastmeta.tasks.domains`.
        minutes: of training in place of the suite's.
        common: `threads` and `device`, as of `fastmeta train`.
    """
    unknown = set(only or ()) - set(rows())
    if unknown:
        raise ValueError(f"rows are {', '.join(rows())}; got {', '.join(sorted(unknown))}")
    results = []
    for kind in KINDS:
        opened = functools.cache(functools.partial(domains, kind, data_root))  # what is done already needs no data
        for name in (*NAMES, UNTRAINED):
            row = f"{name}-{kind}"
            run = functools.partial(_run, name, kind, opened, episodes=episodes, minutes=minutes, common=common)
            wanted = not only or row in only
            result = once(folder / row / "result.json", run if wanted else None, {"episodes": episodes})
            if result is not None:
                results.append(result)
                console.print(f"{row}: far {_percent(_mean(result['far']))}", highlight=False)
    _ranked(results)
    write(folder / "table.json", json.dumps(results, indent=1) + "\n")
    write(folder / "table.md", markdown(results))
    return results


def _run(
    name: str,
    kind: str,
    opened: Callable[[], Domains],
    _: Path,
    *,
    episodes: int,
    minutes: float | None,
    common: dict[str, Any],
) -> dict[str, Any]:
    trained, found = name in ALGORITHMS, opened()
    config = _config(name if trained else "protonet", kind, minutes, common)
    device = prepare(config)

    def source(examples, ways: int = WAYS, shots: int = SHOTS, query_shots: int = QUERIES) -> TaskSource:
        return EpisodeSampler(examples, ways=ways, shots=shots, query_shots=query_shots, device=device)

    began, steps = time.perf_counter(), 0
    algorithm = NearestNeighbour(nn.Flatten(), centre="support", normalise=True).to(device)
    if trained:
        sizes = (config.train_ways, config.train_shots, config.train_query_shots)
        tasks = MixedTasks({source(examples, *sizes): 1.0 for examples in found.train.values()})
        algorithm = build_algorithm(config, tasks, device)
        trainer = Trainer(
            algorithm, tasks, task_batch=config.task_batch, outer_lr=config.outer_lr, minutes=config.minutes,
            iterations=config.iterations, seed=config.seed,
        )  # fmt: skip
        if trainer.run() is not None:
            raise KeyboardInterrupt
        steps = trainer.step
    inner = config.eval_inner_steps if hasattr(algorithm, "inner_steps") else None
    judged = {
        where: {name: evaluate(algorithm, source(examples), episodes=episodes, inner_steps=inner).as_json()["accuracy"]
                for name, examples in getattr(found, where).items()}
        for where in ("near", "far")
    }  # fmt: skip
    return {
        "name": name, "kind": kind, **judged, "steps": steps,
        "minutes": (time.perf_counter() - began) / 60, "trained_on": list(found.train),
        "device": str(device), "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip


def _config(name: str, kind: str, minutes: float | None, common: Mapping[str, Any]) -> RunConfig:
    options = {"ways": WAYS, "shots": SHOTS, "query_shots": QUERIES, "train_ways": WAYS, "train_query_shots": 5}
    options |= {"task_batch": 4, "outer_lr": 2e-3, "lr_schedule": "constant", **_MODELS[kind]}
    if not ALGORITHMS[name].fixed_ways:
        options |= _MANY
    given = {key: value for key, value in common.items() if value is not None}
    config = run_config(name, "omniglot", **options, **given)
    return config if minutes is None else dataclasses.replace(config, minutes=minutes)


def _mean(judged: Mapping[str, Any]) -> float:
    return sum(one["mean"] for one in judged.values()) / max(1, len(judged))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _ranked(results: list[dict[str, Any]]) -> None:
    """Adds `mean_rank` over the far domains of a kind, 1 the best; equals share the mean of their ranks."""
    for kind in KINDS:
        of_kind = [r for r in results if r["kind"] == kind]
        for result in of_kind:
            ranks = []
            for domain, own in result["far"].items():
                others = [r["far"][domain]["mean"] for r in of_kind]
                better, equal = sum(o > own["mean"] for o in others), sum(o == own["mean"] for o in others)
                ranks.append(better + (equal + 1) / 2)
            result["mean_rank"] = sum(ranks) / max(1, len(ranks))


def markdown(results: list[dict[str, Any]]) -> str:
    lines = []
    for kind in KINDS:
        of_kind = sorted((r for r in results if r["kind"] == kind), key=lambda r: r["mean_rank"])
        if not of_kind:
            continue
        near, far = (list(of_kind[0][where]) for where in ("near", "far"))
        heads = [kind, "mean rank", *far, *(f"{name}, other classes" for name in near), "minutes"]
        lines += [
            f"Trained on {', '.join(of_kind[0]['trained_on'])}; {WAYS}-way {SHOTS}-shot, per cent ± 95% interval.", "",
            f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}",
        ]  # fmt: skip
        for r in of_kind:
            judged = (*r["far"].values(), *r["near"].values())
            cells = [f"{100 * one['mean']:.1f} ± {100 * one['ci95']:.1f}" for one in judged]
            cells = [r["name"], f"{r['mean_rank']:.1f}", *cells, f"{r['minutes']:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)
