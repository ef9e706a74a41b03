"""What a trained algorithm says of held-out tasks, query by query: what a report shows of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ...tasks import Inputs
from ..evaluate import judged
from ..metrics import Estimate

if TYPE_CHECKING:
    from ...algorithms import MetaOutput
    from ...tasks import EpisodeSampler, TaskBatch, TaskSource

TASKS_SHOWN = 3
MISTAKES_SHOWN = 24
_POINTS_SHOWN = 2000


class Query(NamedTuple):
    """A query row: the example, its class and the one predicted (regression: its targets and those predicted, `[O]`),
    as names, and the probability of that (None in regression). In a mistake, a support example of both classes."""

    x: Tensor
    true: str | Tensor
    predicted: str | Tensor
    probability: float | None = None
    of_true: Tensor | None = None
    of_predicted: Tensor | None = None


class Task(NamedTuple):
    """A task: its support rows with their classes, its query rows."""

    support: list[tuple[Tensor, str | Tensor]]
    queries: list[Query]


@dataclass
class Predictions:
    """`tasks` are the first few, `mistakes` the most confident of all, `confusion` how often a query of the one named
    class was taken for the other (None where classes have no names), `points` `[n, 2]` pairs of target and prediction
    in regression, in the targets' own unit, and `own_error` the root of their mean squared difference where that is not
    the unit of training."""

    loss: Estimate
    accuracy: Estimate | None
    tasks: list[Task] = field(default_factory=list)
    mistakes: list[Query] = field(default_factory=list)
    confusion: Counter[tuple[str, str]] | None = None
    points: Tensor | None = None
    own_error: float | None = None


def predict_tasks(
    algorithm: nn.Module,
    tasks: TaskSource,
    *,
    episodes: int,
    inner_steps: int | None = None,
    seed: int = 0,
    named: bool = False,
) -> Predictions:
    """Judge `algorithm` on `episodes` tasks, as `fastmeta.training.evaluate` does, and keep what a report shows.

    named: whether the data's classes have names: `tasks` is then an `~fastmeta.tasks.EpisodeSampler`.
    """
    losses, accuracies, points = [], [], []
    inputs = Inputs.of(tasks)
    restored = inputs.restore_targets
    tasks = _Named(tasks) if named else tasks
    confusion: Counter[tuple[str, str]] | None = Counter() if named else None
    shown: list[Task] = []
    mistakes: list[Query] = []
    for batch, output in judged(algorithm, tasks, episodes=episodes, inner_steps=inner_steps, seed=seed):
        losses.append(output.task_loss)
        few = range(min(TASKS_SHOWN - len(shown), batch.num_tasks))
        if output.accuracy is None:
            own = _rows(batch.query_mask, batch.query_y)
            batch = batch._replace(support_y=restored(batch.support_y), query_y=restored(batch.query_y))
            output = output._replace(logits=restored(output.logits))
            points.append(torch.stack([batch.query_y[own].flatten(), output.logits[own].flatten()], 1).cpu())
            shown += [_regressed(batch, output, task) for task in few]
            continue
        accuracies.append(output.accuracy)
        found = _Classified(batch, output, tasks.names_of(batch) if named else _numbered(batch))
        if confusion is not None:
            confusion += found.confusion()
        shown += [found.task(task) for task in few]
        mistakes = sorted([*mistakes, *found.mistakes()], key=lambda query: -query.probability)[:MISTAKES_SHOWN]
    every = torch.cat(points) if points else None
    own_error = None
    if every is not None and inputs.table is not None:
        own_error = float(every.diff(dim=1).double().square().mean().sqrt())
    if every is not None and len(every) > _POINTS_SHOWN:
        every = every[:: -(-len(every) // _POINTS_SHOWN)]
    accuracy = Estimate.of(torch.cat(accuracies)) if accuracies else None
    return Predictions(Estimate.of(torch.cat(losses)), accuracy, shown, mistakes, confusion, every, own_error)


class _Named:
    """The episodes of a sampler, of which it is known which of the data's classes they have."""

    def __init__(self, tasks: EpisodeSampler):
        self.tasks, examples = tasks, tasks.examples
        self.kind, self.input_shape, self.output_size = tasks.kind, tasks.input_shape, tasks.output_size
        number = torch.arange(len(examples)).repeat_interleave(examples.counts).unsqueeze(1)
        self._numbers = tasks.over(number.to(tasks.device), "numbers of classes")
        self._classes: Tensor | None = None
        self._names = examples.names
        if len(set(self._names)) < len(self._names) and examples.groups is not None:
            self._names = tuple(map("/".join, zip(examples.groups, examples.names, strict=True)))

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> TaskBatch:
        before = generator.get_state()
        self._classes = self._numbers.sample(num_tasks, generator=generator).support_x.squeeze(2)
        generator.set_state(before)
        return self.tasks.sample(num_tasks, generator=generator)

    def names_of(self, batch: TaskBatch) -> list[dict[int, str]]:
        """Of each task of the batch that was sampled last, by label."""
        own = _rows(batch.support_mask, batch.support_y)
        return [
            {label: self._names[number] for label, number in zip(y[rows].tolist(), cls[rows].tolist(), strict=True)}
            for y, cls, rows in zip(batch.support_y, self._classes, own, strict=True)
        ]


def _numbered(batch: TaskBatch) -> list[dict[int, str]]:
    """Where classes have no names, their labels in the task stand for them."""
    return [{label: f"class {label}" for label in set(y.tolist())} for y in batch.support_y]


class _Classified:
    """The queries of a task batch with the classes that were predicted; `names` of each task's, by label."""

    def __init__(self, batch: TaskBatch, output: MetaOutput, names: list[dict[int, str]]):
        self.batch, self.names = batch, names
        self.probability, column = output.logits.softmax(-1).max(-1)
        self.predicted = column if output.classes is None else output.classes.gather(1, column)
        self.query_rows = _rows(batch.query_mask, batch.query_y)
        self.support_rows = _rows(batch.support_mask, batch.support_y)

    def task(self, task: int) -> Task:
        own = self.support_rows[task].nonzero().flatten().tolist()
        y = self.batch.support_y[task]
        support = [(self.batch.support_x[task, row].cpu(), self._name(task, y[row])) for row in own]
        return Task(support, [self._query(task, row) for row in self.query_rows[task].nonzero().flatten().tolist()])

    def mistakes(self) -> list[Query]:
        """Those of highest probability."""
        wrong = (self.predicted != self.batch.query_y) & self.query_rows
        best = self.probability.masked_fill(~wrong, -1).flatten().topk(min(MISTAKES_SHOWN, wrong.numel()))
        places = [divmod(place, wrong.shape[1]) for place in best.indices.tolist()]
        return [self._query(task, row, beside=True) for task, row in places if wrong[task, row]]

    def confusion(self) -> Counter[tuple[str, str]]:
        """How often a query of the one class was taken for the other."""
        pairs = zip(self.batch.query_y.tolist(), self.predicted.tolist(), self.query_rows.tolist(), strict=True)
        return Counter(
            (names[true], names[predicted])
            for names, (ys, found, own) in zip(self.names, pairs, strict=True)
            for true, predicted, there in zip(ys, found, own, strict=True)
            if there
        )

    def _query(self, task: int, row: int, beside: bool = False) -> Query:
        true, predicted = self.batch.query_y[task, row], self.predicted[task, row]
        both = [self._support_of(task, label) for label in (true, predicted)] if beside else []
        return Query(
            self.batch.query_x[task, row].cpu(), self._name(task, true), self._name(task, predicted),
            float(self.probability[task, row]), *both,
        )  # fmt: skip

    def _support_of(self, task: int, label: Tensor) -> Tensor:
        row = ((self.batch.support_y[task] == label) & self.support_rows[task]).nonzero()[0, 0]
        return self.batch.support_x[task, row].cpu()

    def _name(self, task: int, label: Tensor) -> str:
        return self.names[task][int(label)]


def _regressed(batch: TaskBatch, output: MetaOutput, task: int) -> Task:
    support_rows, query_rows = _rows(batch.support_mask, batch.support_y), _rows(batch.query_mask, batch.query_y)

    def of(rows: Tensor, *tensors: Tensor):
        return zip(*(tensor[task][rows[task]].cpu() for tensor in tensors), strict=True)

    queries = of(query_rows, batch.query_x, batch.query_y, output.logits)
    return Task(list(of(support_rows, batch.support_x, batch.support_y)), [Query(*row) for row in queries])


def _rows(mask: Tensor | None, y: Tensor) -> Tensor:
    """`[T, B]`: the tasks' own rows."""
    return y.new_ones(y.shape[:2], dtype=torch.bool) if mask is None else mask
