"""`fastmeta reproduce --suite cross-domain`: trained on some domains, judged on domains that were never seen.

Every learner trains for the same time on tasks of all training domains, and is judged on the same tasks of every other.
Of the domains that nothing was trained on, each ranks the learners; the table is in the order of their mean ranks.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..algorithms import NearestNeighbour
from ..tasks import EpisodeSampler, MixedTasks, TaskSource
from ..tasks.domains import KINDS, Domains, domains
from ..training import RunConfig, Trainer, evaluate, run_config
from ..training.registry import ALGORITHMS
from ..training.run import build_algorithm, prepare
from ._results import machine

WAYS, SHOTS, QUERIES = 5, 1, 10
EPISODES = 200  # in each domain: judging all of them must not take longer than training
NAMES = tuple(name for name in ALGORITHMS if name != "contrastive")  # which has no use for labels
UNTRAINED = "nearest"  # neighbour on centred numbers of unit length: what every other row has to beat
_MANY = {"train_ways": 10, "train_query_shots": 5, "task_batch": 4}
_MODELS = {
    "pictures": {"model": "conv4", "hidden": (32,), "minutes": 1.0},
    "vectors": {"model": "mlp", "hidden": (128, 64), "minutes": 0.4},
}


def rows(
    data_root: str, *, episodes: int, common: dict[str, Any]
) -> dict[str, Callable[[Path], dict[str, Any] | None]]:
    """What runs each row. `data_root` as of `fastmeta.tasks.domains`; `common`: `threads` and `device`, as of
    `fastmeta train`."""
    found = {}
    for kind in KINDS:
        opened = functools.cache(functools.partial(domains, kind, data_root))  # what is done already needs no data
        for name in (*NAMES, UNTRAINED):
            run = functools.partial(_run, name, kind, opened, episodes=episodes, common=common)
            found[f"{name}-{kind}"] = run
    return found


def describe(result: dict[str, Any]) -> str:
    far = [one["mean"] for one in result["far"].values()]
    return f"{100 * sum(far) / max(1, len(far)):.1f} % on domains never seen"


def _run(
    name: str,
    kind: str,
    opened: Callable[[], Domains],
    _: Path,
    *,
    episodes: int,
    common: dict[str, Any],
) -> dict[str, Any] | None:
    trained, found = name in ALGORITHMS, opened()
    config = _config(name if trained else "protonet", kind, common)
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
            return None
        steps = trainer.step
    inner = config.eval_inner_steps if hasattr(algorithm, "inner_steps") else None
    judged = {
        where: {name: evaluate(algorithm, source(examples), episodes=episodes, inner_steps=inner).as_json()["accuracy"]
                for name, examples in getattr(found, where).items()}
        for where in ("near", "far")
    }  # fmt: skip
    return {
        "learner": name, "kind": kind, **judged, "steps": steps,
        "minutes": (time.perf_counter() - began) / 60, "trained_on": list(found.train), **machine(device),
    }  # fmt: skip


def _config(name: str, kind: str, common: Mapping[str, Any]) -> RunConfig:
    options = {"ways": WAYS, "shots": SHOTS, "query_shots": QUERIES, "train_ways": WAYS, "train_query_shots": 5}
    options |= {"task_batch": 4, "outer_lr": 2e-3, "lr_schedule": "constant", **_MODELS[kind]}
    if not ALGORITHMS[name].fixed_ways:
        options |= _MANY
    given = {key: value for key, value in common.items() if value is not None}
    return run_config(name, "omniglot", **options, **given)


def ranked(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With `mean_rank` over the far domains of a kind, 1 the best; equals share the mean of their ranks."""
    found = []
    for result in results:
        ranks = []
        for domain, own in result["far"].items():
            others = [r["far"][domain]["mean"] for r in results if r["kind"] == result["kind"]]
            better, equal = sum(o > own["mean"] for o in others), sum(o == own["mean"] for o in others)
            ranks.append(better + (equal + 1) / 2)
        found.append(result | {"mean_rank": sum(ranks) / max(1, len(ranks))})
    return found


def markdown(results: list[dict[str, Any]]) -> str:
    """A table for each kind, of `ranked` results."""
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
            cells = [r["learner"], f"{r['mean_rank']:.1f}", *cells, f"{r['minutes']:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)
