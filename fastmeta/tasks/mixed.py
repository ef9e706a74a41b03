"""Tasks of several data sets in one batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmeta import values
from fastmeta.batch import TaskBatch
from fastmeta.tasks.source import TaskSource, check_source


class MixedTasks:
    """Every task of a batch comes from one of several sources, drawn by weight and independently of the others.

    Args:
        sources: each source of tasks with its weight, a number above 0: `MixedTasks({letters: 2, emoji: 1})`. All must
            be of one kind, with inputs of one shape and dtype on one device; targets of regression, of one width.

    Tasks of different sizes are padded to the largest with rows, labels and targets of 0, and masks say which rows are
    a task's own. `output_size` of classification is the largest. Inputs and targets are tensors.

    Raises:
        TypeError: a source that is none, a weight that is no number. ValueError: no source, a weight of 0 or below,
            sources that do not go together. In `sample`: dtypes or devices that differ.
    """

    def __init__(self, sources: Mapping[TaskSource, float]):
        if not isinstance(sources, Mapping) or not sources:
            raise TypeError(f"sources must map sources of tasks to weights, one or more, got {values.shown(sources)}")
        for source in sources:
            check_source(source)
        self.sources = tuple(sources)
        self.weights = tuple(
            values.number(f"sources, the weight of {_name(source)}", weight, 0, open=True)
            for source, weight in sources.items()
        )
        first = self.sources[0]
        for source in self.sources:
            for what in ("kind", "input_shape", *(("output_size",) if first.kind == "regression" else ())):
                one, other = getattr(first, what), getattr(source, what)
                if one != other:
                    raise ValueError(
                        f"sources must have the same {what}, got {one} of {_name(first)} and {other} of {_name(source)}"
                    )
        self.kind, self.input_shape = first.kind, tuple(first.input_shape)
        self.output_size = max(source.output_size for source in self.sources)

    def sample(self, num_tasks: int, *, generator: torch.Generator | None = None) -> TaskBatch:
        """`num_tasks` tasks, drawn with `generator` or the global one. Waits for the device of the generator."""
        values.count("num_tasks", num_tasks, 0)
        device = "cpu" if generator is None else generator.device
        which = torch.rand(num_tasks, dtype=torch.float64, device=device, generator=generator)
        edges = torch.tensor(self.weights, dtype=torch.float64, device=device).cumsum(0)
        which = torch.searchsorted(edges[:-1], which * edges[-1], right=True).cpu()
        counts = which.bincount(minlength=len(self.sources)).tolist()
        # with no task in it, a batch still says of what shape and dtype the rows are
        drawn = [i for i, count in enumerate(counts) if count] or [0]
        batches = [self.sources[i].sample(counts[i], generator=generator) for i in drawn]
        if len(batches) == 1:
            return batches[0]
        support_x, support_y, support_mask = self._joined(batches, drawn, 0)
        query_x, query_y, query_mask = self._joined(batches, drawn, 1)
        # `batches` hold the tasks source by source; each goes to the place for which its source was drawn
        place = which.argsort(stable=True).argsort().to(support_x.device)
        fields = (support_x, support_y, query_x, query_y, support_mask, query_mask)
        return TaskBatch(*(None if field is None else field[place] for field in fields))

    def _joined(self, batches: list[TaskBatch], drawn: list[int], part: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Inputs, targets and mask, of the support (part 0) or query rows (1), of all tasks, source by source."""
        inputs, targets = ([batch[2 * part + i] for batch in batches] for i in (0, 1))
        masks = [(batch.support_mask, batch.query_mask)[part] for batch in batches]
        for i, x, y in zip(drawn, inputs, targets, strict=True):
            for one, first in ((x, inputs[0]), (y, targets[0])):
                if one.dtype != first.dtype or one.device != first.device:
                    raise ValueError(
                        f"sources must give one dtype on one device, got {values.dtype_of(first)} on {first.device} of "
                        f"{_name(self.sources[drawn[0]])} and {values.dtype_of(one)} on {one.device} of "
                        f"{_name(self.sources[i])}"
                    )
        most = max(x.shape[1] for x in inputs)
        mask = None
        if any(each is not None for each in masks) or any(x.shape[1] < most for x in inputs):
            whole = [x.new_ones(x.shape[:2], dtype=torch.bool) for x in inputs]
            masks = [all_of_it if mask is None else mask for mask, all_of_it in zip(masks, whole, strict=True)]
            mask = torch.cat([_padded(each, most) for each in masks])
        return (*(torch.cat([_padded(each, most) for each in those]) for those in (inputs, targets)), mask)


def _padded(rows: Tensor, most: int) -> Tensor:
    """`[T, most, ...]` of `[T, S, ...]`, with 0 behind."""
    return F.pad(rows, (0, 0) * (rows.dim() - 2) + (0, most - rows.shape[1]))


def _name(source: TaskSource) -> str:
    return str(getattr(source, "name", type(source).__name__))
