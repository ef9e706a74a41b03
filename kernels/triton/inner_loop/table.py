"""The table that says where a program keeps what of its task: its columns, a line for each layer. `layout` makes it."""

from __future__ import annotations

import triton.language as tl

OUT = tl.constexpr(0)  # the layer's width
COLUMNS = tl.constexpr(1)  # elements of a weight's row: inputs, and the bias
AT = tl.constexpr(2)  # where it is in a state
# where the support rows have its input, its pre-activations, their gradients (deltas), and what delta gets of a tangent
INPUT = tl.constexpr(3)
BEFORE = tl.constexpr(4)
DELTA = tl.constexpr(5)
BEND = tl.constexpr(6)
SUPPORT = tl.constexpr(0)
QUERY = tl.constexpr(4)  # the same of query rows: so many columns on
STEP_INPUT = tl.constexpr(11)
DOT_INPUT = tl.constexpr(12)  # tangents of the input
DOT = tl.constexpr(13)  # tangents of pre-activations, then of deltas
WIDTH = tl.constexpr(14)  # of a line
