"""What the inner loops' kernels and functions take in one argument each.

Triton takes named tuples apart, and compiles for an integer 1 in them; `How` alone is a constant as a whole. No field
may be called `values` or `type`, which Triton's own tuples have.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Pointer = Any  # a tensor on the host, in a kernel a pointer to its first element
Number = Any  # an int on the host, in a kernel a number that it was launched with


class How(NamedTuple):
    """What kernels are compiled for; of the way back all is False where there is none."""

    GIVEN: bool  # the Gram form: the first layer's pre-activations are given, `base`
    LOSS: int
    ACTIVATION: int
    MOMENTUM: bool
    DECAY: bool
    ELEMENTWISE: bool  # a rate for each element of the state
    TF32: bool
    ACC: Any
    BLOCK_R: int  # side of a tile over rows
    BLOCK_W: int  # over the width of a layer
    BLOCK_P: int  # elements of a state at a time
    SWEEPS: bool = False  # goes back through the steps, which keep their states and rows
    CURVED: bool = False  # with their second derivatives: not in first-order MAML
    BENT: bool = False  # and the activation has one
    WANTS_RATES: bool = False  # for which steps keep what their update was made of
    WANTS_STATE: bool = False
    WANTS_INPUT: bool = False
    WANTS_BASE: bool = False
    WANTS_QUERY_INPUT: bool = False
    WANTS_QUERY_BASE: bool = False


# of a launch ----------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    tasks: Number
    support: Number  # rows of a task
    queries: Number
    steps: Number
    layers: Number
    width: Number  # of a row of the first layer's input
    first: Number  # of the first layer's pre-activations in the Gram form, else as `width`


class Places(NamedTuple):
    """Elements of a program's scratch, where in it states, moments and adjoints begin, and elements of a step's rows
    and of a state."""

    size: Number
    states: Number
    moments: Number
    adjoint: Number
    record: Number
    state: Number


class Strides(NamedTuple):
    """From a task to the next, 0 where they share them."""

    initial: Number
    rates: Number
    elements: Number


class Problem(NamedTuple):
    initial: Pointer  # `[T, P]` or `[1, P]`: the states that tasks begin with
    rates: Pointer  # `[T, K, L]` or `[1, K, L]`
    elements: Pointer  # as `initial`: rates of elements
    numbers: Pointer  # momentum, weight decay, and where the Huber loss bends
    table: Pointer
    sizes: Sizes
    places: Places
    strides: Strides


class Rows(NamedTuple):
    input: Pointer  # of the first layer
    base: Pointer  # its pre-activations in the Gram form
    target: Pointer
    weight: Pointer


class RowGradients(NamedTuple):
    input: Pointer
    base: Pointer


class Sums(NamedTuple):
    """Gradients of what tasks may share: a row for each task, or for each program."""

    initial: Pointer
    rates: Pointer
    elements: Pointer


# of a task ------------------------------------------------------------------------------------------------------------


class Rates(NamedTuple):
    """Rates of a task, or their gradients, from some step on."""

    layers: Pointer
    elements: Pointer


class Gradients(NamedTuple):
    """What a task's way back adds to."""

    input: Pointer
    base: Pointer
    rates: Rates


class Pass(NamedTuple):
    """One pass of some rows through the net: `shift` says how far its rows are from those of the first step."""

    memory: Pointer
    table: Pointer
    layers: Number
    rows: Number
    state: Pointer
    shift: Number


class Targets(NamedTuple):
    """What the loss of logits `[rows, outputs]` depends on beside them."""

    target: Pointer
    weight: Pointer
    bends_at: Number
    rows: Number
    outputs: Number


class Tile(NamedTuple):
    """Rows `m` and columns `n` of a matrix: which of them it has, and where their elements are."""

    m: Any
    n: Any
    m_mask: Any
    n_mask: Any
    mask: Any
    at: Any
