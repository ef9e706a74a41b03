"""Tasks of one person each, from labelled windows of many people."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta import values
from fastmeta.batch import TaskBatch
from fastmeta.tasks._arguments import check_sizes
from fastmeta.tasks.drawing import subsets


class PersonTasks:
    """Tasks of one person each: which of N activities is it, told by a few windows of that person's own.

    A task draws a person, N of the activities of which the person has `shots + query_shots` windows and more, and of
    each disjoint support and query windows. Labels are numbers from 0 to N - 1 in an order that is drawn too, so that
    nothing can be said without the support set.

    Args:
        x: float32 `[R, ...]`, the windows of all people, as `wisdm` gives them or your own.
        activity: int64 `[R]`, what is done in each.
        person: int64 `[R]`, by whom.
        ways: N, activities per task; 3 by default.
        shots: support windows per activity; 1 by default. S = N * shots, ordered by label.
        query_shots: query windows per activity; 5 by default. Q = N * query_shots, ordered by label.

    `sample` gives inputs `[T, S, ...]` and `[T, Q, ...]`, and labels int64.

    Raises:
        TypeError, ValueError: sizes below 1, columns of different lengths; nobody with so many activities and windows.
    """

    kind = "classification"

    def __init__(
        self, x: Tensor, activity: Tensor, person: Tensor, *, ways: int = 3, shots: int = 1, query_shots: int = 5
    ):
        check_sizes(ways=ways, shots=shots, query_shots=query_shots)
        if not len(x) == len(activity) == len(person):
            raise ValueError(f"x, activity and person must have as many rows: {len(x)}, {len(activity)}, {len(person)}")
        self.x, self.ways, self.shots, self.query_shots = x, ways, shots, query_shots
        people, who = person.unique(return_inverse=True)
        activities, what = activity.unique(return_inverse=True)
        group = who * len(activities) + what
        self._rows = group.argsort(stable=True)  # those of a person's activity side by side
        counts = group.bincount(minlength=len(people) * len(activities)).view(len(people), len(activities))
        starts = counts.flatten().cumsum(0).view_as(counts) - counts
        enough = counts >= shots + query_shots
        serve = enough.sum(1) >= ways
        if not serve.any():
            raise ValueError(
                f"no task (no person) has {ways} classes with {shots} + {query_shots} rows each: ask for fewer ways, "
                "shots or query_shots"
            )
        self._counts, self._starts, self._number = counts[serve], starts[serve], enough[serve].sum(1)
        self._activities = enough[serve].sort(dim=1, descending=True, stable=True).indices  # first those with enough

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    @property
    def output_size(self) -> int:
        return self.ways

    def sample(self, num_tasks: int, *, generator: torch.Generator | None = None) -> TaskBatch:
        """`num_tasks` tasks, drawn with `generator` (of the windows' device) or the global one."""
        return self.sample_part(num_tasks, slice(None), generator=generator)

    def sample_part(self, num_tasks: int, part: slice, *, generator: torch.Generator | None = None) -> TaskBatch:
        """The tasks `part` of the `num_tasks` of `sample`: all are drawn, and the rows of these gathered."""
        values.count("num_tasks", num_tasks, 0)
        values.generator("generator", generator, self.x.device)
        drawn = {"device": self.x.device, "generator": generator}
        person = torch.randint(len(self._counts), (num_tasks,), **drawn)
        chosen = subsets(num_tasks, self._number[person], self.ways, **drawn)
        chosen = self._activities[person].gather(1, chosen)  # [T, N]
        counts, starts = (column[person].gather(1, chosen) for column in (self._counts, self._starts))
        window = subsets(counts.numel(), counts.flatten(), self.shots + self.query_shots, **drawn)
        rows = self._rows[(starts.unsqueeze(-1) + window.unflatten(0, counts.shape))[part]]
        labels = torch.arange(self.ways, device=self.x.device)

        def labelled(rows: Tensor) -> tuple[Tensor, Tensor]:
            return self.x[rows.flatten(1)], labels.repeat_interleave(rows.shape[2]).repeat(len(rows), 1)

        return TaskBatch(*labelled(rows[..., : self.shots]), *labelled(rows[..., self.shots :]))
