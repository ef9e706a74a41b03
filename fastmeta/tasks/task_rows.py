"""One store of rows by task: where personalised learning takes its tasks from."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

from fastmeta import values
from fastmeta.tasks.examples import Examples


class TaskRows:
    """Rows, what is to be told of each, and the task of each: a patient, a sensor, a user. Tasks may differ in size.

    Args:
        rows: `[R, ...]`, inputs.
        targets: floating `[R, O]` or `[R]` (then O is 1) for regression; int64 `[R]`, numbers of classes, for
            classification.
        tasks: the task of each row: int64 `[R]`, or `R` of anything that can be told apart.
        names: of the tasks, in the order of their sorted values; default what they are, as text.
        classes: names of the classes, of classification; default their numbers.
        name: of the whole, for messages.

    Attributes:
        by_task: the rows as `Examples` whose classes are the tasks: `by_task.order` and `by_task.offsets`.

    Raises:
        TypeError, ValueError: columns of different lengths, or of another kind.
    """

    groups = None

    def __init__(
        self,
        rows: Tensor,
        targets: Tensor,
        tasks: Tensor | Sequence[Hashable],
        *,
        names: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        name: str = "task rows",
    ):
        values.tensor("targets", targets)
        self.by_task = Examples(rows, tasks, names=names, name=name)
        if targets.is_floating_point():
            targets = targets.unsqueeze(1) if targets.dim() == 1 else targets
        if targets.dim() != (2 if targets.is_floating_point() else 1) or len(targets) != len(rows):
            got = f"{values.dtype_of(targets)} {list(targets.shape)}"
            raise ValueError(f"targets must be floating [R, O] or int64 [R] of {len(rows)} rows, got {got}")
        if not targets.is_floating_point() and targets.dtype != torch.int64:
            raise TypeError(f"targets must be floating, or int64 numbers of classes, got {values.dtype_of(targets)}")
        self.targets, self.classes = targets, None
        if self.kind == "classification":
            most = int(targets.max()) + 1
            self.classes = tuple(map(str, range(most) if classes is None else classes))
            if int(targets.min()) < 0 or most > len(self.classes):
                raise ValueError(f"targets must be numbers from 0 to {len(self.classes) - 1}")

    @property
    def kind(self) -> str:
        """What its tasks are: "regression" or "classification"."""
        return "regression" if self.targets.is_floating_point() else "classification"

    @property
    def rows(self) -> Tensor:
        return self.by_task.rows

    @property
    def name(self) -> str:
        return self.by_task.name

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tasks."""
        return self.by_task.names

    @property
    def counts(self) -> Tensor:
        """Rows of each task, int64 `[number of tasks]`."""
        return self.by_task.counts

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.by_task.input_shape

    def __len__(self) -> int:
        """Number of tasks."""
        return len(self.by_task)

    def of_task(self, index: int) -> tuple[Tensor, Tensor]:
        """Rows and targets of a task."""
        start, end = self.by_task.offsets[index], self.by_task.offsets[index + 1]
        chosen = self.by_task.order[start:end]
        return self.rows[chosen.to(self.rows.device)], self.targets[chosen.to(self.targets.device)]

    def only(self, tasks: Iterable[int], *, name: str | None = None) -> TaskRows:
        """Those of some tasks, by number. Rows are not copied."""
        return self._with(self.by_task.only(tasks, name=name), self.targets)

    def to(self, device: torch.device | str) -> TaskRows:
        """The same with rows and targets on `device`; of them only those in use."""
        kept = self.by_task.order.sort().values
        return self._with(self.by_task.to(device), self.targets[kept.to(self.targets.device)].to(device))

    def _with(self, by_task: Examples, targets: Tensor) -> TaskRows:
        found = object.__new__(TaskRows)
        found.by_task, found.targets, found.classes = by_task, targets, self.classes
        return found

    def __repr__(self) -> str:
        least, most = int(self.counts.min()), int(self.counts.max())
        sizes = f"{least} to {most}" if least < most else f"{least}"
        return f"TaskRows({self.name!r}: {len(self)} tasks of {sizes} rows {list(self.input_shape)}, {self.kind})"
