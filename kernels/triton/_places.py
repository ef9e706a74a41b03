"""Where an operand that repeats over tasks or over the elements of a tensor has its numbers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# where an operand of a [T, n] result has its elements: [T, n], [1, n], [T, 1], [1, 1]
FULL, COLUMN, TASK, ONE = (tl.constexpr(i) for i in range(4))


@triton.jit
def place(element, columns, MODE: tl.constexpr):
    if MODE == FULL:
        return element
    elif MODE == COLUMN:
        return element % columns
    elif MODE == TASK:
        return element // columns
    else:
        return element * 0


def mode(operand: Tensor, tasks: int, columns: int) -> int:
    if operand.shape[1] == columns:
        return (FULL if operand.shape[0] == tasks else COLUMN).value
    return (TASK if operand.shape[0] == tasks else ONE).value
