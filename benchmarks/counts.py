"""The least work that an exact answer takes, as the roofline needs it: products of matrices, and bytes that must move.

FLOPs are those of dense matrix products, `2 m n p` for `[m, n]` by `[n, p]`, in whichever known form of the algorithm
has the fewest (docs/inner-loops.md derives the forms); what one implementation does beyond that does not count, and
neither does elementwise work, where there are products beside it. A symmetric product counts its half. So a count may
be too low, never too high, until somebody finds a cheaper form: then the report shows it as an error in the bound.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def maml(sizes: tuple[int, ...], tasks: int, rows: int, queries: int, steps: int) -> int:
    """FLOPs of the exact, second-order meta-gradient of a net of linear layers, inputs and rates without gradients.

    Args:
        sizes: widths from input to output.
        tasks: T.
        rows: support rows S of a task.
        queries: query rows Q of a task.
        steps: inner steps K, 1 and up.
    """
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, got {steps}")
    hidden = zip(sizes[1:-1], sizes[2:], strict=True)
    first = _first_layer(sizes[0], sizes[1], rows, queries, steps)
    return tasks * (first + sum(_layer(i, o, rows, queries, steps) for i, o in hidden))


def _layer(width_in: int, width_out: int, rows: int, queries: int, steps: int) -> int:
    """One task, a layer behind another: its weights are formed up to step K - m, the last m steps are low rank."""
    theta, width = width_in * width_out, width_in + width_out
    # forward, gradient at the inputs, update; in the reverse sweep two products each for the tangents' forward, their
    # backward and the result. Queries: forward, gradient at the inputs, gradient of the weights
    formed = 18 * steps * rows * theta + 6 * queries * theta
    # m low-rank steps: no update, no product with the direction (three in all), but Gram matrices and corrections, each
    # with two adjoints, between the m steps' rows and between the queries and them
    gained = (
        6 * m * rows * theta - 6 * m * (m - 1) * rows**2 * width - 6 * m * rows * queries * width
        for m in range(steps + 1)
    )
    return formed - max(gained)


def _first_layer(width_in: int, width_out: int, rows: int, queries: int, steps: int) -> int:
    """One task, the layer that is given the examples, the same rows in every step: no gradient at its inputs.

    Support and queries take the form that is cheaper for each: the weights formed, or coefficients C of the rows,
    `W^k = W - C^T X`, and Gram matrices, which the steps share.
    """
    theta, support_gram, query_gram = width_in * width_out, rows * (rows + 1) * width_in, 2 * queries * rows * width_in
    # forward, update, product with the direction and result in each step; the last update and the first direction are
    # made for the queries' sake
    formed = (8 * steps - 4) * rows * theta
    # forward and gradient of the weights once; a correction and its adjoint in each step but the first
    coefficients = 4 * rows * theta + (support_gram + 4 * (steps - 1) * rows**2 * width_out if steps > 1 else 0)
    query = 4 * queries * theta + min(4 * rows * theta, query_gram + 4 * queries * rows * width_out)
    return min(formed, coefficients) + query


def supervised(sizes: tuple[int, ...], rows: int) -> int:
    """FLOPs of plain training on `rows` rows: forward, gradient at the inputs but for the first layer's, of weights."""
    thetas = [i * o for i, o in zip(sizes[:-1], sizes[1:], strict=True)]
    return rows * (4 * thetas[0] + 6 * sum(thetas[1:]))


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors, each element once."""
    return sum(t.numel() * t.element_size() for t in tensors)
