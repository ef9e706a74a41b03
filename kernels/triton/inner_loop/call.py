"""A call of an inner loop's op: what of it the kernels do not serve, and what they are launched with."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta.kernels._common import ACTIVATIONS, INTERPRETED, launch, tf32, tile, triton_accumulator
from fastmeta.kernels._sums import sum_over_tasks
from fastmeta.kernels.inner_loop.layout import MOST_ELEMENTS, Layout, Shape, constant, lay_out, programs_for
from fastmeta.kernels.inner_loop.losses import LOSSES
from fastmeta.kernels.inner_loop.state import pack, unpack
from fastmeta.kernels.inner_loop.structures import How, Places, Problem, RowGradients, Rows, Sizes, Strides, Sums


class TaskRows:
    """Rows of all tasks `[T, B, ...]` as kernels take them. In the Gram form their input is the inner products."""

    def __init__(self, x: Tensor, target: Tensor, weight: Tensor, gram: Tensor, given: bool):
        self.x, self.gram, self.given = x, gram, given
        self.count = x.shape[1]
        self.pointers = Rows(gram if given else x, x, target, weight)

    def gradients(self, needs: int, x_bit: int, gram_bit: int) -> TaskRowGradients:
        return TaskRowGradients(self, bool(needs >> x_bit & 1), bool(needs >> gram_bit & 1))


class TaskRowGradients:
    """Zeros to be added to, for rows and for their inner products, of size 0 where they are not wanted."""

    def __init__(self, rows: TaskRows, wants_x: bool, wants_gram: bool):
        self.x = torch.zeros_like(rows.x) if wants_x else rows.x.new_empty(0)
        self.gram = torch.zeros_like(rows.gram) if wants_gram else rows.gram.new_empty(0)
        # as kernels take them: of the first layer's input, and of its pre-activations in the Gram form
        self.pointers = RowGradients(self.gram, self.x) if rows.given else RowGradients(self.x, self.x)
        self.wanted = (wants_gram, wants_x) if rows.given else (wants_x, False)


class Wants(NamedTuple):
    """The gradients that are asked for, of what both ops have."""

    weights: bool
    biases: bool
    rates: bool
    element_rates: bool

    @classmethod
    def of(cls, needs: int, first: int) -> Wants:
        """`needs` has a bit for each, from bit `first` on."""
        return cls(*(bool(needs >> bit & 1) for bit in range(first, first + 4)))


class Call:
    """The arguments that both ops share; wants: of the gradient, None of the op itself."""

    def __init__(self, support, query, weights, biases, rates, element_rates, loss, activation, delta, momentum,
                 weight_decay, first_order, *, wants: Wants | None = None):  # fmt: skip
        self.weights, self.biases, self.rates, self.element_rates = weights, biases, rates, element_rates
        self.loss, self.activation, self.delta = loss, activation, delta
        self.momentum, self.weight_decay = momentum, weight_decay
        self.steps, self.layers = rates.shape[1:]
        self.given = len(weights) < self.layers
        self.support = TaskRows(*support, self.given)
        self.query = None if query is None else TaskRows(*query, self.given)
        self.tasks = self.support.x.shape[0]
        self.wants, self.backward = wants, wants is not None
        # what the way back through the steps is needed for
        steps = self.backward and self.steps > 0
        self.curved = steps and not first_order
        self.wants_rates = steps and (wants.rates or (wants.element_rates and bool(element_rates)))
        self.sweeps = self.curved or self.wants_rates or (steps and weight_decay != 0)

    @property
    def bent(self) -> bool:
        return self.curved and self.activation not in ("identity", "relu")

    @cached_property
    def layout(self) -> Layout:
        width = self.support.x.shape[2]
        return lay_out(
            Shape(
                rows=self.support.count,
                queries=0 if self.query is None else self.query.count,
                steps=self.steps,
                widths=(*((self.support.count,) if self.given else ()), width, *(w.shape[1] for w in self.weights)),
                biased=bool(self.biases),
                gram=self.given,
                momentum=self.momentum != 0,
                backward=self.backward,
                keeps=self.sweeps,
                keeps_moments=self.wants_rates,
                tangents=self.curved,
                bent=self.bent,
            )
        )

    def why_not(self) -> str | None:
        if self.loss not in LOSSES:
            return f"loss {self.loss} is not one of {', '.join(LOSSES)}"
        if self.given and (self.weight_decay or self.element_rates):
            return "there is no weight decay and no rate per element in the Gram form"
        if self.layout.size > MOST_ELEMENTS:
            return f"a task's weights and rows, {self.layout.size} elements, are more than {MOST_ELEMENTS}"
        return None

    # what is launched -----------------------------------------------------------------------------------------------

    @cached_property
    def programs(self) -> int:
        return programs_for(self.layout, self.tasks, self.support.x.dtype)

    @cached_property
    def first(self) -> int:
        """Elements of a state that stand for the first layer in the Gram form."""
        return self.support.count * self.support.x.shape[2] if self.given else 0

    def state(self, weights: list[Tensor], biases: list[Tensor], coefficients: Tensor | None = None) -> Tensor:
        """`[T, P]`, or `[1, P]`; coefficients `[T, S, O]`: none are zeros."""
        if not self.given:
            return pack(weights, biases)
        x = self.support.x
        first = x.new_zeros(1, self.first) if coefficients is None else -coefficients.transpose(1, 2)
        return pack(weights, biases, first)

    @cached_property
    def inputs(self) -> tuple[Tensor, ...]:
        """State, rates, rates of elements, momentum and the like, and the table."""
        initial = self.state(self.weights, self.biases)
        own = initial
        if self.element_rates:
            count = len(self.weights)
            own = pack(self.element_rates[:count], self.element_rates[count:])
        numbers = constant((self.momentum, self.weight_decay, self.delta), initial.dtype, initial)
        return initial, self.rates, own, numbers, constant(self.layout.table, torch.int32, initial)

    @property
    def problem(self) -> Problem:
        return Problem(*self.inputs, self._sizes, self._places, self._strides)

    @property
    def _strides(self) -> Strides:
        return Strides(*(t.shape[1:].numel() if t.shape[0] == self.tasks != 1 else 0 for t in self.inputs[:3]))

    @property
    def _sizes(self) -> Sizes:
        queries = 0 if self.query is None else self.query.count
        width = self.support.count if self.given else self.support.x.shape[2]
        return Sizes(self.tasks, self.support.count, queries, self.steps, self.layers, width, self.support.x.shape[2])

    @property
    def _places(self) -> Places:
        of = self.layout
        return Places(of.size, of.states, of.moments, of.adjoint, of.record, of.state)

    @property
    def outputs(self) -> int:
        return self.weights[-1].shape[1] if self.weights else self.support.x.shape[2]

    def fast_weights(self, states: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Adapted states `[T, P]` as weights, biases, and coefficients of the first layer `[T, S, O]`."""
        weights, biases = unpack(states, self.weights, self.biases, self.first)
        if not self.given:
            return weights, biases, states.new_empty(self.tasks, 0, 0)
        first = states[:, : self.first].view(self.tasks, self.support.x.shape[2], self.support.count)
        return weights, biases, -first.transpose(1, 2).contiguous()

    def launch(self, kernel, *arguments, **wanted: bool) -> None:
        """Run `kernel(*arguments, memory, problem, HOW)`; wanted: of `How`, gradients of rows."""
        memory = self.support.x.new_empty(self.programs, self.layout.size)
        # left alone the assembler spills a few registers for the sake of more programs at a time
        launch(kernel, self.programs, *arguments, memory, self.problem, HOW=self._how(**wanted), maxnreg=255)

    def _how(self, **wanted: bool) -> How:
        dtype = self.support.x.dtype
        # the interpreter's time goes by the number of tiles, not by their size
        most = 64 if INTERPRETED else 16 if dtype == torch.float64 else 32
        rows = max(self.support.count, 0 if self.query is None else self.query.count)
        return How(
            GIVEN=self.given,
            LOSS=LOSSES.index(self.loss),
            ACTIVATION=ACTIVATIONS.index(self.activation),
            MOMENTUM=self.momentum != 0,
            DECAY=self.weight_decay != 0,
            ELEMENTWISE=bool(self.element_rates),
            TF32=tf32(dtype),
            ACC=triton_accumulator(dtype),
            BLOCK_R=tile(rows, most, 16),
            BLOCK_W=tile(max(line[1] for line in self.layout.table), most, 16),
            BLOCK_P=tile(self.layout.state, 4096 if INTERPRETED else 1024, 128),
            SWEEPS=self.sweeps,
            CURVED=self.curved,
            BENT=self.bent,
            WANTS_RATES=self.wants_rates,
            WANTS_STATE=self.backward and (self.wants.weights or self.wants.biases),
            **wanted,
        )

    # gradients ------------------------------------------------------------------------------------------------------

    def new_sums(self) -> Sums:
        """Zeros to be added to, for states, rates, and rates of elements: a row for each task, or for each program of
        what tasks share."""
        wants, found = self.wants, []
        for like, wanted in zip(
            self.inputs[:3],
            (wants.weights or wants.biases, wants.rates or self.wants_rates, wants.element_rates or self.wants_rates),
            strict=True,
        ):
            per_task = like.shape[0] == self.tasks != 1
            count = self.tasks if per_task else self.programs
            found.append(like.new_zeros(count, *like.shape[1:]) if wanted else like.new_empty(0))
        return Sums(*found)

    def split(self, sums: Sums) -> tuple:
        """`new_sums` to the gradients of weights, biases, rates and rates of elements, of size 0 where not wanted."""
        wants, (initial, rates, own, *_), (d_state, d_rates, d_own) = self.wants, self.inputs, sums
        weights, biases = self._in_layers(d_state, initial, self.weights, self.biases, (wants.weights, wants.biases))
        own_rates = self.element_rates[: len(self.weights)], self.element_rates[len(self.weights) :]
        found = self._in_layers(d_own, own, *own_rates, (wants.element_rates,) * 2) if self.element_rates else ([], [])
        return weights, biases, _summed(d_rates, rates) if wants.rates else d_rates.new_empty(0), found[0] + found[1]

    def _in_layers(self, gradient: Tensor, like: Tensor, weights, biases, wanted) -> list[list[Tensor]]:
        if not any(wanted):
            return [[t.new_empty(0) for t in tensors] for tensors in (weights, biases)]
        return [
            [_summed(g, t) if wants else t.new_empty(0) for g, t in zip(gradients, tensors, strict=True)]
            for gradients, tensors, wants in zip(
                unpack(_summed(gradient, like), weights, biases, self.first), (weights, biases), wanted, strict=True
            )
        ]


def _summed(gradient: Tensor, like: Tensor) -> Tensor:
    return gradient if gradient.shape[0] == like.shape[0] else sum_over_tasks(gradient, like.dtype)
