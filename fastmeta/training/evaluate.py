"""Held-out accuracy or error, with its confidence interval."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import values
from .._trees import named_leaves
from ..algorithms import ProtoNet
from ..tasks.source import check_source
from .distributed import Ranks, ranks
from .embed import at_once, embed, embedding_pays
from .metrics import CalibrationError, Estimate, finite_or_none

if TYPE_CHECKING:
    from ..algorithms import MetaOutput
    from ..tasks import TaskBatch, TaskSource

# Task batches are cut so that one batch's inputs hold at most this many numbers: the activations of a conv4
# then take about 1 GB.
_NUMBERS_PER_BATCH = 1 << 22
# Keeps held-out tasks away from the random stream of a training run with the same seed, which for sinusoids
# would be the same tasks.
_STREAM = 0x6D657461


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. `accuracy` is None for regression, whose `loss` is the mean squared error.

    `calibration_error` is the expected one over all queries, see `~fastmeta.training.metrics.CalibrationError`; None
    for regression. `loss_by_step[k]` is the query loss after `k` inner steps, from 0 (before adaptation) on; empty
    unless asked for.
    """

    loss: Estimate
    accuracy: Estimate | None = None
    loss_by_step: list[Estimate] = field(default_factory=list)
    calibration_error: float | None = None

    @property
    def score(self) -> float:
        """Larger is better."""
        return self.accuracy.mean if self.accuracy is not None else -self.loss.mean

    def as_json(self) -> dict[str, Any]:
        result: dict[str, Any] = {"loss": self.loss.as_json()}
        if self.accuracy is not None:
            result["accuracy"] = self.accuracy.as_json()
        if self.calibration_error is not None:
            result["calibration_error"] = finite_or_none(self.calibration_error)
        if self.loss_by_step:
            result["loss_by_step"] = [estimate.as_json() for estimate in self.loss_by_step]
        return result


def evaluate(
    algorithm: nn.Module,
    tasks: TaskSource,
    *,
    episodes: int = 600,
    inner_steps: int | None = None,
    by_step: bool = False,
    seed: int = 0,
    stop: Callable[[], bool] | None = None,
) -> Evaluation | None:
    """Judge `algorithm` on `episodes` tasks, many at a time, without gradients for the outer loop and in eval
    mode.

    In processes that have joined a group of `torch.distributed` each judges its part of the tasks, and all get the
    result of all; all must call this.

    A `~fastmeta.algorithms.ProtoNet` embeds every image of the split once where that is less work than
    embedding those of each episode.

    Args: inner_steps: steps of adaptation instead of the algorithm's own; only for algorithms that have
        `inner_steps`. by_step: also the loss after every number of inner steps from 0 to `inner_steps`, on
        the same tasks. seed: of the tasks: the same seed gives the same tasks, so that two models can be
        compared task by task. stop: polled between task batches; when it returns True, the evaluation is
        given up and None comes back.
    """
    values.module("algorithm", algorithm)
    check_source(tasks)
    values.count("episodes", episodes)
    if inner_steps is not None:
        values.count("inner_steps", inner_steps, 0)
    values.flag("by_step", by_step)
    values.seed("seed", seed)
    values.function("stop", stop, or_none=True)
    if inner_steps is not None and not hasattr(algorithm, "inner_steps"):
        raise ValueError(f"inner_steps: {type(algorithm).__name__} has no inner loop")
    parameter = next(algorithm.parameters(), None)  # an untrained rule on pixels has none
    device = torch.device("cpu") if parameter is None else parameter.device
    last = getattr(algorithm, "inner_steps", None) if inner_steps is None else inner_steps
    counts = list(range(last + 1)) if by_step and last is not None else [last]
    losses: list[list[Tensor]] = [[] for _ in counts]
    accuracies: list[Tensor] = []
    calibration, group, given_up = CalibrationError(), ranks(), False
    with _judging(algorithm, tasks), torch.no_grad():
        judged = algorithm
        if isinstance(algorithm, ProtoNet) and embedding_pays(algorithm, at_once(tasks), episodes):
            embedded = embed(algorithm.encoder, at_once(tasks), stop)
            if embedded is None:
                return None
            judged, tasks = ProtoNet(nn.Flatten(), metric=algorithm.metric, ways=algorithm.ways).eval(), embedded
        for batch in _batches(tasks, episodes, torch.Generator(device).manual_seed(_STREAM + seed), group):
            if given_up := stop is not None and stop():
                break
            for steps, kept in zip(counts, losses, strict=True):
                if steps is not None:
                    judged.inner_steps = steps
                output = judged(batch)
                kept.append(output.task_loss)
            if output.accuracy is not None:
                accuracies.append(output.accuracy)
                if output.logits is not None:
                    calibration.add(output.logits, batch.query_y, batch.query_mask, output.classes)
    if group.any(given_up):
        return None
    calibration.sums = group.summed(calibration.sums.cpu())
    by_step_estimates = [_estimate(kept, group, episodes) for kept in losses]
    accuracy = _estimate(accuracies, group, episodes) if group.any(bool(accuracies)) else None
    curve = by_step_estimates if by_step and last is not None else []
    return Evaluation(by_step_estimates[-1], accuracy, curve, calibration.read())


def _estimate(parts: list[Tensor], group: Ranks, episodes: int) -> Estimate:
    own = torch.cat(parts).to("cpu", torch.float64) if parts else torch.zeros(0, dtype=torch.float64)
    return Estimate.of(group.gathered(own, episodes))


@torch.no_grad()
def judged(
    algorithm: nn.Module, tasks: TaskSource, *, episodes: int, inner_steps: int | None = None, seed: int = 0
) -> Iterator[tuple[TaskBatch, MetaOutput]]:
    """`episodes` tasks, some at a time, and what `algorithm` makes of them, in eval mode and with `inner_steps` as
    `evaluate`, whose tasks these are."""
    device = next((parameter.device for parameter in algorithm.parameters()), torch.device("cpu"))
    with _judging(algorithm, tasks):
        if inner_steps is not None:
            algorithm.inner_steps = inner_steps
        for batch in _batches(tasks, episodes, torch.Generator(device).manual_seed(_STREAM + seed)):
            yield batch, algorithm(batch)


@contextmanager
def _judging(algorithm: nn.Module, tasks: TaskSource):
    """Eval mode and the tasks' number of classes inside, everything as it was outside."""
    was_training = algorithm.training
    before = {name: getattr(algorithm, name) for name in ("inner_steps", "ways") if hasattr(algorithm, name)}
    algorithm.eval()
    if "ways" in before:
        algorithm.ways = tasks.output_size
    try:
        yield
    finally:
        algorithm.train(was_training)
        for name, value in before.items():
            setattr(algorithm, name, value)


def _batches(
    tasks: TaskSource, episodes: int, generator: torch.Generator, group: Ranks | None = None
) -> Iterator[TaskBatch]:
    """All episodes, or this process's of them; then batches are drawn as by one process, and may be empty."""
    group = group or Ranks()
    state = generator.get_state()
    probe = tasks.sample(1, generator=generator)
    generator.set_state(state)
    numbers = sum(leaf.numel() for x in (probe.support_x, probe.query_x) for _, leaf in named_leaves(x, ""))
    size = max(1, _NUMBERS_PER_BATCH // max(1, numbers))
    for start in range(0, episodes, size):
        count = min(size, episodes - start)
        batch = group.sample(tasks, count, generator, start)
        if range(count)[group.own(count, start)]:
            yield batch
