"""Representative calls of inner loops, for compilation ahead of time."""

from __future__ import annotations

import torch

from fastmeta.kernels._common import INNER_LOOP_DTYPES


def examples(new):
    """(support, query, arguments behind those) of each; rows are x, targets, weights and inner products. None in half
    precision, which the kernels do not serve."""
    if new(1).dtype not in INNER_LOOP_DTYPES:
        return
    yield _example(
        new, 1000, 10, 10, 5, (1, 40, 40, 1), "mse", "tanh", momentum=0.9, weight_decay=0.1, elementwise=True
    )
    yield _example(new, 1000, 10, 10, 1, (1, 40, 40, 1), "huber", "gelu")
    yield _example(new, 32, 5, 75, 5, (784, 64, 64, 5), "cross_entropy", "relu", gram=True)
    yield _example(new, 1, 1, 1, 1, (1, 1), "binary_cross_entropy", "identity")  # every size is compiled in


def _example(
    new,
    tasks,
    support,
    queries,
    steps,
    widths,
    loss,
    activation,
    *,
    momentum=0.0,
    weight_decay=0.0,
    elementwise=False,
    gram=False,
):
    def rows_of(count):
        labelled = loss == "cross_entropy"
        return (
            new(tasks, count, widths[gram]),
            new(tasks, count, dtype=torch.int64) if labelled else new(tasks, count, widths[-1]),
            new(tasks, count),
            new(tasks, count, support) if gram else new(1, 0, 0),
        )

    pairs = list(zip(widths[:-1], widths[1:], strict=True))[gram:]
    weights, biases = [new(1, o, i) for i, o in pairs], [new(1, o) for _, o in pairs]
    own = [torch.empty_like(t) for t in (*weights, *biases)] if elementwise else []
    rest = new(1, steps, len(widths) - 1), own, loss, activation, 1.0, momentum, weight_decay, False
    return rows_of(support), rows_of(queries), (weights, biases, *rest)
