"""Where a program keeps what of its task: one table with a line for each layer, and how large it all is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from fastmeta.kernels._common import INTERPRETED
from fastmeta.kernels.inner_loop import table as columns

MOST_ELEMENTS = 2**31 - 1  # a program counts its own in 32 bits
SCRATCH_BYTES = 256 << 20  # for all programs: as many run as fit, one at least


@dataclass(frozen=True)
class Shape:
    """What a layout depends on. `widths` `[L + 1]`; in the Gram form the first is the number of support rows."""

    rows: int
    queries: int
    steps: int
    widths: tuple[int, ...]
    biased: bool
    gram: bool
    momentum: bool
    backward: bool = False
    keeps: bool = False  # states and rows of all steps
    keeps_moments: bool = False  # and what each update was made of
    tangents: bool = False
    bent: bool = False  # whether the activation has a second derivative

    @property
    def layers(self) -> int:
        return len(self.widths) - 1

    def columns(self, layer: int) -> int:
        """Elements of a weight's row."""
        return self.widths[layer] + (self.biased and not (self.gram and layer == 0))


@dataclass(frozen=True)
class Layout:
    """`table` `[L + 1][WIDTH]`, where states, moments and adjoints begin, and elements of a step's rows, of a state and
    of all together."""

    table: tuple[tuple[int, ...], ...]
    states: int
    moments: int
    adjoint: int
    record: int
    state: int
    size: int


class _Carver:
    def __init__(self):
        self.used = 0

    def take(self, *sides: int) -> int:
        at, count = self.used, 1
        for side in sides:
            count *= side
        self.used += count
        return at


def _take_rows(carver: _Carver, shape: Shape, table: list[list[int]], rows: int, side: int, bent: bool) -> None:
    for layer in range(shape.layers):
        width = shape.widths[layer + 1]
        table[layer][columns.BEFORE.value + side] = carver.take(rows, width)
        table[layer][columns.DELTA.value + side] = carver.take(rows, width)
        if bent:
            table[layer][columns.BEND.value + side] = carver.take(rows, width)
        if layer + 1 < shape.layers:
            table[layer + 1][columns.INPUT.value + side] = carver.take(rows, shape.columns(layer + 1))


@lru_cache(256)
def lay_out(shape: Shape) -> Layout:
    # behind the last layer's line one whose "columns" are the outputs
    table = [[0] * columns.WIDTH.value for _ in range(shape.layers + 1)]
    table[shape.layers][columns.COLUMNS.value] = shape.widths[-1]
    state = _Carver()
    for layer in range(shape.layers):
        line = table[layer]
        line[columns.OUT.value], line[columns.COLUMNS.value] = shape.widths[layer + 1], shape.columns(layer)
        line[columns.AT.value] = state.take(shape.widths[layer + 1], shape.columns(layer))
    rows, query = _Carver(), columns.QUERY.value
    table[0][columns.INPUT.value] = rows.take(shape.rows, shape.columns(0))
    table[0][columns.INPUT.value + query] = rows.take(shape.queries, shape.columns(0))
    identity = rows.take(shape.rows, shape.rows) if shape.gram else table[0][columns.INPUT.value]
    first = rows.used
    _take_rows(rows, shape, table, shape.rows, 0, shape.bent)
    record = rows.used - first
    rows.take(max(shape.steps - 1, 0) if shape.keeps else 0, record)
    _take_rows(rows, shape, table, shape.queries, query, False)
    for layer in range(shape.layers):
        line = table[layer]
        line[columns.STEP_INPUT.value] = line[columns.INPUT.value] if layer else identity
        if shape.tangents:
            line[columns.DOT.value] = rows.take(shape.rows, shape.widths[layer + 1])
            line[columns.DOT_INPUT.value] = rows.take(shape.rows, shape.columns(layer)) if layer else 0
    states = rows.take(shape.steps + 1 if shape.keeps else 1, state.used)
    moments = rows.take(shape.steps if shape.keeps_moments else int(shape.momentum), state.used)
    # with its direction and the adjoint of the moments
    adjoint = rows.take(3 if shape.backward else 0, state.used)
    return Layout(tuple(map(tuple, table)), states, moments, adjoint, record, state.used, rows.used)


def programs_for(layout: Layout, tasks: int, dtype: torch.dtype) -> int:
    """As many as there are tasks, or as have room."""
    # the interpreter runs one after the other: few, so that tests see what a program does with its second task
    most = 2 if INTERPRETED else max(1, SCRATCH_BYTES // max(1, layout.size * dtype.itemsize))
    return min(tasks, most)


@cache  # for good: a CUDA graph reads it at every replay
def _kept(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        made = torch.tensor(values, dtype=dtype, device=device)
    if device.type == "cuda":  # other streams will read it
        torch.cuda.current_stream(device).synchronize()
    return made


def constant(values: tuple, dtype: torch.dtype, like: Tensor) -> Tensor:
    """A small tensor to read only, on the device of `like`: kept, as copying it there waits for the device."""
    return _kept(values, dtype, like.device)
