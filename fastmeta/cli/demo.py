"""`fastmeta demo`: what the engine does, seen in under three minutes on two CPU cores."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ..algorithms import MAML
from ..tasks.omniglot import is_local
from ..training import Evaluation, RunConfig, Trainer, evaluate, run_config
from ..training.checkpoint import check_writable
from ..training.reporting import ConsoleReporter
from ..training.run import build_tasks, build_trainer

_TASK_BATCH = 500


def run_demo(
    folder: str | Path = "demo",
    *,
    data_root: str | Path | None = None,
    quick: bool = False,
    console: Console | None = None,
) -> dict[str, float]:
    """Train MAML on sinusoids and a prototypical network on characters, compare with `torch.func`, draw
    `curves.png`.

    Args: folder: where the picture goes; made if absent. data_root: folder that holds Omniglot; without it,
        FASTMETA_DATA. Without either, drawn glyphs: nothing is downloaded. quick: a few steps of everything,
        only to see that it runs.

    Returns the figures that it prints.
    """
    from .picture import draw_curves

    console = console or Console()
    folder = Path(folder)
    check_writable(folder)
    began = time.perf_counter()
    episodes = 20 if quick else 1000
    maml, regression = _sinusoids(console, 0.5 if quick else 45, episodes)
    accuracy, accuracy_name = _characters(console, 0.5 if quick else 55, episodes, data_root)
    console.print("the same meta-gradient with torch.func (vmap of grad), in turn", highlight=False)
    ours, plain, difference = compare(maml.algorithm, maml.tasks, _TASK_BATCH, seconds=0.5 if quick else 10)
    picture = folder / "curves.png"
    draw_curves(maml.algorithm, build_tasks(_sinusoid_config(1), "test", maml.device, query_shots=200), picture)

    before, one, five = (regression.loss_by_step[k] for k in (0, 1, 5))
    table = Table(
        title=f"fastmeta demo, {torch.get_num_threads()} threads on {maml.device}, {time.perf_counter() - began:.0f} s"
    )
    table.add_column("what")
    table.add_column("result", justify="right")
    table.add_row("sinusoids, 10 shots: MSE before adaptation", before.plain())
    table.add_row("after 1 inner step", one.plain())
    table.add_row("after 5 inner steps", five.plain())
    table.add_row(accuracy_name, accuracy.accuracy.percent())
    table.add_row(f"second-order MAML, {_TASK_BATCH} sinusoid tasks a step: fastmeta", f"{ours:,.0f} tasks/s")
    table.add_row("torch.func, same gradient (largest difference " + f"{difference:.0e})", f"{plain:,.0f} tasks/s")
    table.add_row("fastmeta is", f"{ours / plain:.1f} times as fast")
    console.print(table)
    console.print(f"adaptation curves: {picture}", highlight=False, soft_wrap=True)
    return {
        "mse_before": before.mean,
        "mse_after_1": one.mean,
        "mse_after_5": five.mean,
        "accuracy": accuracy.accuracy.mean,
        "tasks_per_second": ours,
        "torch_func_tasks_per_second": plain,
    }


def _sinusoid_config(iterations: int) -> RunConfig:
    return run_config(
        "maml",
        "sinusoid",
        task_batch=_TASK_BATCH,
        iterations=iterations,
        outer_lr=1e-2,
        lr_schedule="cosine",
        eval_every=0,
    )


def _sinusoids(console: Console, seconds: float, episodes: int) -> tuple[Trainer, Evaluation]:
    console.print("[bold]second-order MAML on sinusoids[/bold]: fit 10 points in one gradient step", highlight=False)
    # longer, and what fits in one inner step is so sharp that a second one overshoots
    trainer = _train(console, _sinusoid_config, seconds, most=15_000)
    tasks = build_tasks(_sinusoid_config(1), "test", trainer.device)
    return trainer, evaluate(trainer.algorithm, tasks, episodes=episodes, inner_steps=5, by_step=True)


def _characters(
    console: Console, seconds: float, episodes: int, data_root: str | Path | None
) -> tuple[Evaluation, str]:
    real = data_root is not None or is_local()
    data = "omniglot" if real else "glyphs"
    where = "Omniglot" if real else "drawn glyphs (--data-root names a folder with Omniglot)"

    def config(iterations: int) -> RunConfig:
        return run_config(
            "protonet", data, train_ways=40, train_query_shots=2, hidden=(32,), iterations=iterations, outer_lr=4e-3,
            lr_schedule="cosine", eval_every=0, data_root=str(data_root) if data_root is not None else None,
        )  # fmt: skip

    console.print(f"[bold]prototypical network[/bold] on {where}", highlight=False, soft_wrap=True)
    trainer = _train(console, config, seconds)
    evaluation = evaluate(trainer.algorithm, build_tasks(config(1), "test", trainer.device), episodes=episodes)
    return evaluation, f"{data}, 5-way 1-shot, {episodes:,} episodes of unseen characters: accuracy"


def _train(console: Console, config: Callable[[int], RunConfig], seconds: float, most: int | None = None) -> Trainer:
    """Train for about `seconds`, or for `most` steps where they are sooner done.

    The cosine must know its end in steps, so a few steps are timed first.
    """
    pilot = build_trainer(config(1000), None)
    pilot.train_step()
    steps, began = 0, time.perf_counter()
    while steps < 5 or (time.perf_counter() - began < seconds / 30):
        pilot.train_step()
        steps += 1
    iterations = max(3, round(seconds * steps / (time.perf_counter() - began)))
    iterations = iterations if most is None else min(iterations, most)
    reporter = ConsoleReporter(console, iterations=iterations, minutes=None, regression=False)
    trainer = build_trainer(config(iterations), None, (reporter,))
    trainer.minutes = 1.3 * seconds / 60  # a machine that slows down ends the demo early, not late
    with reporter:
        received = trainer.run()
    if received is not None:
        raise SystemExit(128 + received)
    return trainer


def compare(maml: MAML, tasks, num_tasks: int, *, seconds: float) -> tuple[float, float, float]:
    """Tasks per second of `maml` and of plain `torch.func` for one meta-gradient of the same batch.

    Both are run in turn, so that whatever else the machine does slows both; the figures are medians. The
    third value is the largest difference between the two gradients, relative to the largest gradient.
    """
    batch = tasks.sample(num_tasks)
    parameters = [p for p in maml.model.parameters() if p.requires_grad]
    contenders = (lambda: maml(batch).loss, lambda: torch_func_loss(maml, batch))
    times: tuple[list[float], list[float]] = ([], [])
    gradients: list[tuple[Tensor, ...]] = []
    for loss in contenders:  # also the warm-up
        gradients.append(torch.autograd.grad(loss(), parameters))
    scale = max(float(g.abs().max()) for g in gradients[1])
    difference = max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True)) / scale
    began = time.perf_counter()
    while len(times[0]) < 5 or time.perf_counter() - began < seconds:
        for loss, kept in zip(contenders, times, strict=True):
            _wait(batch[0])
            start = time.perf_counter()
            torch.autograd.grad(loss(), parameters)
            _wait(batch[0])
            kept.append(time.perf_counter() - start)
    return num_tasks / statistics.median(times[0]), num_tasks / statistics.median(times[1]), difference


def torch_func_loss(maml: MAML, batch) -> Tensor:
    """The meta-loss as one would write it with `torch.func` alone, for squared error."""
    model, weights = maml.model, dict(maml.model.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(functional_call(model, weights, (x,)), y)

    def one_task(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        fast = weights
        for _ in range(maml.inner_steps):
            gradients = grad(loss)(fast, support_x, support_y)
            fast = {name: fast[name] - maml.inner_lr * gradients[name] for name in fast}
        return loss(fast, query_x, query_y)

    return vmap(one_task)(*batch).mean()


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
