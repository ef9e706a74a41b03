"""Which engine `auto` takes."""

import pytest
import torch
from torch import nn

from fastmeta import MAML
from fastmeta.tasks import TaskBatch


@pytest.mark.parametrize(("channels", "queries", "mapped"), [(4, 15, True), (64, 75, False)])
def test_convolutions_are_mapped_where_there_is_little_in_a_call(channels, queries, mapped):
    """On a CPU a loop over the tasks is faster for large activations, several times slower for small ones."""
    model = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(channels * 784, 5))
    labels = [torch.zeros(8, rows, dtype=torch.int64) for rows in (5, queries)]
    batch = TaskBatch(torch.randn(8, 5, 1, 28, 28), labels[0], torch.randn(8, queries, 1, 28, 28), labels[1])
    told = MAML(model).explain(batch)
    assert ("loop: picked" in told) is not mapped
    assert ("slower than a loop" in told) is not mapped
    one = TaskBatch(*(part[:1] for part in batch))
    assert "loop: picked" in MAML(model).explain(one)
