"""Rows that say which class and number they are, what was drawn of them, and whether draws are even."""

import math

import torch
from conftest import DEVICE

from fastmeta.tasks import Examples

COUNTS = (8, 11, 30, 5, 9, 17, 8)
SIZES = {"ways": 3, "shots": 2, "query_shots": 3}


def seeded(seed=0):
    return torch.Generator(DEVICE).manual_seed(seed)


def numbered(counts=COUNTS):
    """Rows [class + 1, number + 1, seven more], shuffled; 0 is padding."""
    rows = torch.tensor([[c + 1, i + 1, 7] for c, count in enumerate(counts) for i in range(count)])
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))].to(DEVICE)
    return Examples(rows, rows[:, 0], name="letters")


def even(counts, probabilities=None):
    """Whether counts are what the probabilities (None: equal ones) say, by chi-square, five deviations allowed."""
    counts = counts.double().cpu()
    expected = counts.sum() * (torch.full_like(counts, 1 / len(counts)) if probabilities is None else probabilities)
    chi, free = ((counts - expected).square() / expected).sum(), len(counts) - 1
    assert expected.min() > 20, "too few draws to say"
    return chi < free + 5 * math.sqrt(2 * free)


def tasks_of(batch):
    """Of each task: {label: (class, numbers in support, numbers in query)}, after checking rows against labels."""
    found = []
    parts = ((batch.support_x, batch.support_y, batch.support_mask), (batch.query_x, batch.query_y, batch.query_mask))
    for t in range(batch.num_tasks):
        task = {}
        for part, (x, y, mask) in enumerate(parts):
            own = torch.ones_like(y[t], dtype=torch.bool) if mask is None else mask[t]
            assert not x[t][~own].any() and not y[t][~own].any()
            assert (own.long().diff() <= 0).all() and (y[t][own].diff() >= 0).all()  # padded behind, sorted by label
            for row, label in zip(x[t][own].long().tolist(), y[t][own].tolist(), strict=True):
                assert row[2] == 7
                cls, *numbers = task.setdefault(label, (row[0], [], []))
                assert cls == row[0], "a label is one class"
                numbers[part].append(row[1])
        assert sorted(task) == list(range(len(task)))
        assert len({cls for cls, *_ in task.values()}) == len(task), "labels are different classes"
        found.append(task)
    return found


def disjoint(task):
    return all(len({*support, *query}) == len(support) + len(query) for _, support, query in task.values())
