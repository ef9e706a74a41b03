"""What a learner reads, and how rows of a user's own become that: stored with every run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastmeta.tasks.source import TaskSource


_SIDE, _LOOKED_AT = 8, 1024  # of `told_of_pixels`: the least side of a picture without channels, and rows


@dataclass(frozen=True)
class Inputs:
    """Of the tasks that a run is trained on `kind`, `input_shape` and `output_size`, as of a
    `~fastmeta.tasks.TaskSource`.

    `background` is what transparent pictures were laid over. `table`, of a run on a table, is how its columns became
    numbers: the column of the `"label"` (classification), and as JSON of `~fastmeta.tasks.read.Features` the
    `"features"` and (regression) the `"targets"`.
    """

    kind: str
    input_shape: tuple[int, ...]
    output_size: int
    background: str = "white"
    table: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, tasks: TaskSource) -> Inputs:
        """Of a source of tasks, which says more in an attribute `inputs`, if it has one."""
        known = getattr(tasks, "inputs", None)
        return known if known is not None else cls(tasks.kind, tuple(tasks.input_shape), tasks.output_size)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Inputs:
        """The inverse of `as_json`."""
        return cls(**{**found, "input_shape": tuple(found["input_shape"])})

    @property
    def images(self) -> bool:
        """Whether examples are images `[C, H, W]`, grey or RGB."""
        return len(self.input_shape) == 3 and self.input_shape[0] in (1, 3)

    def allowed(self) -> str:
        """The shapes that `prepare` takes, in words."""
        shape = self.input_shape
        forms = [shape]
        if self.images:
            forms += [(*shape[1:], shape[0])] + ([shape[1:]] if shape[0] == 1 else [])
        if len(shape) > 1:
            forms.append((torch.Size(shape).numel(),))
        return " or ".join(f"[n, {', '.join(map(str, form))}]" for form in forms)

    def prepare(self, x: Tensor) -> Tensor:
        """What the learner reads `[n, *input_shape]`, for rows in one of the shapes of `allowed()`: images with
        channels first or last, or any example flattened. uint8 (of which 255 is 1.0) or numbers of any other type. A
        table's rows are its features in their order, numbers as they stand in the table: they are standardised as in
        training. The same dtype where that is floating, else float32.

        Raises:
            ValueError: rows of another shape.
        """
        rows, shape = tuple(x.shape[1:]), self.input_shape
        if self.images and rows != shape and rows == (*shape[1:], shape[0]):
            x = x.movedim(-1, 1)
        elif self.images and rows == shape[1:] and shape[0] == 1:
            x = x.unsqueeze(1)
        elif rows != shape:
            if len(rows) != 1 or rows[0] != torch.Size(shape).numel():
                raise ValueError(f"x must be {self.allowed()}, as the learner was trained on; got {list(x.shape)}")
            x = x.unflatten(1, shape)
        return self._scaled("features", as_numbers(x))

    def prepare_targets(self, y: Tensor) -> Tensor:
        """Targets `[n, O]` of regression on a table, as they were scaled in training."""
        return self._scaled("targets", y)

    def restore_targets(self, y: Tensor) -> Tensor:
        """The inverse of `prepare_targets`, of predictions."""
        scale = self._scale("targets")
        return y if scale is None else y * y.new_tensor(scale[1]) + y.new_tensor(scale[0])

    def _scaled(self, part: str, rows: Tensor) -> Tensor:
        """Numeric columns, the first, with mean 0 and variance 1; what stands behind them are zeros and ones."""
        scale = self._scale(part)
        if scale is None:
            return rows
        mean, scale = map(rows.new_tensor, scale)
        return torch.cat([(rows[:, : len(mean)] - mean) / scale, rows[:, len(mean) :]], 1)

    def _scale(self, part: str) -> tuple[list[float], list[float]] | None:
        columns = None if self.table is None else self.table.get(part)
        return (columns["mean"], columns["scale"]) if columns is not None and columns["shift"] else None


def as_numbers(x: Tensor) -> Tensor:
    """Floating numbers of rows of any kind: of uint8 255 is 1.0."""
    if x.is_floating_point():
        return x
    return x.float().div_(255) if x.dtype == torch.uint8 else x.float()


def told_of_pixels(rows: Tensor) -> str:
    """Words for what looks like pictures `[R, C, H, W]`, `[R, H, W, C]` or square `[R, H, W]` whose values go to 255
    without being uint8: then they are taken as they stand, and a net that was made for 0 to 1 is far off. Else "".
    """
    shape = tuple(rows.shape[1:])
    channels = len(shape) == 3 and {shape[0], shape[2]} & {1, 3, 4}
    square = len(shape) == 2 and shape[0] == shape[1] >= _SIDE
    if rows.dtype in (torch.uint8, torch.bool) or rows.is_complex() or not len(rows) or not (channels or square):
        return ""
    least, most = map(float, rows[:_LOOKED_AT].aminmax())
    if least < 0 or not 2 < most <= 255:
        return ""
    kind = str(rows.dtype).removeprefix("torch.")
    return (
        f"{kind} pictures {list(shape)} with values up to {most:g}, taken as they stand; pictures are uint8 from 0 to "
        "255, or floating from 0 to 1: convert them to uint8, or divide by 255"
    )
