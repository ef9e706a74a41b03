"""Regression tasks from rows by task: what is true of one patient, told by a few of the patient's own rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta import values
from fastmeta.batch import TaskBatch
from fastmeta.tasks._arguments import check_sizes
from fastmeta.tasks.task_rows import TaskRows


class RegressionTasks:
    """A task draws one of the tasks of `task_rows`, and of its rows disjoint support and query rows, in random order.

    Args:
        task_rows: with floating targets; it stays where it is.
        shots: S, support rows; 5 by default.
        query_shots: Q, query rows; 10 by default; "all": all other rows of the task.

    Tasks with no more than `shots` rows are never drawn. Where one has fewer than `shots + Q`, `query_mask` says
    which query rows are its own. `sample` gives inputs `[T, S, ...]` and `[T, Q, ...]`, targets `[T, S, O]` and
    `[T, Q, O]`.

    Raises:
        TypeError, ValueError: sizes below 1, targets that are classes, no task with more than `shots` rows.
    """

    kind = "regression"

    def __init__(self, task_rows: TaskRows, *, shots: int = 5, query_shots: int | str = 10):
        if not isinstance(task_rows, TaskRows):
            raise TypeError(f"task_rows must be TaskRows, got {type(task_rows).__name__}")
        if task_rows.kind != "regression":
            raise ValueError("task_rows must have floating targets for regression: classes are for PersonTasks")
        check_sizes(shots=shots)
        if query_shots != "all":
            check_sizes(query_shots=query_shots)
        device = task_rows.rows.device
        counts = task_rows.counts.to(device)
        serve = counts > shots
        if not serve.any():
            most = int(counts.max())
            raise ValueError(
                f"shots must be below {most}, the rows of the largest task of {task_rows.name}, got {shots}"
            )
        self.task_rows, self.name = task_rows, task_rows.name
        self._counts, self._starts = counts[serve], task_rows.by_task.offsets[:-1].to(device)[serve]
        self._order = task_rows.by_task.order.to(device)
        self.shots, self._most = shots, int(self._counts.max())
        self.query_shots = self._most - shots if query_shots == "all" else query_shots
        self._short = int(self._counts.min()) < shots + self.query_shots

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.task_rows.input_shape

    @property
    def output_size(self) -> int:
        return self.task_rows.targets.shape[1]

    def sample(self, num_tasks: int, *, generator: torch.Generator | None = None) -> TaskBatch:
        """`num_tasks` tasks, drawn with `generator` (of the rows' device) or the global one."""
        return self.sample_part(num_tasks, slice(None), generator=generator)

    def sample_part(self, num_tasks: int, part: slice, *, generator: torch.Generator | None = None) -> TaskBatch:
        """The tasks `part` of the `num_tasks` of `sample`: all are drawn, and the rows of these gathered."""
        values.count("num_tasks", num_tasks, 0)
        values.generator("generator", generator, self._order.device)
        drawn = {"device": self._order.device, "generator": generator}
        task = torch.randint(len(self._counts), (num_tasks,), **drawn)
        count, start = self._counts[task].unsqueeze(1), self._starts[task].unsqueeze(1)
        there = torch.arange(self._most, device=self._order.device) < count
        wanted = self.shots + self.query_shots
        score = torch.rand(there.shape, **drawn).masked_fill(~there, -1.0)
        place = score.topk(min(wanted, self._most), 1).indices
        place = torch.nn.functional.pad(place, (0, wanted - place.shape[1]))
        own = torch.arange(wanted, device=place.device) < count
        own, place, start = own[part], place[part], start[part]
        row = self._order[start + torch.where(own, place, 0)]  # what is masked is a row of the task all the same

        def rows(row: Tensor) -> tuple[Tensor, Tensor]:
            return self.task_rows.rows[row], self.task_rows.targets[row]

        mask = own[:, self.shots :] if self._short else None
        return TaskBatch(*rows(row[:, : self.shots]), *rows(row[:, self.shots :]), None, mask)
