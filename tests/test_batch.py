"""A task batch is a tuple of as many fields as there is something in, wherever it goes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from fastmeta import MAML
from fastmeta.tasks import TaskBatch

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


def batch(masked):
    x, y = torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    return TaskBatch(x, y, x + 1, y, mask, mask) if masked else TaskBatch(x, y, x + 1, y)


@pytest.mark.parametrize("masked", [False, True])
def test_what_is_made_of_one_is_one(masked):
    given = batch(masked)
    assert len(given) == len(given._fields) == (6 if masked else 4)
    ways = [
        pickle.loads(pickle.dumps(given)), copy.copy(given), copy.deepcopy(given), given.to("cpu"), given._replace(),
        TaskBatch(*given), TaskBatch.of(tuple(given)), pytree.tree_map(torch.clone, given),
        pytree.tree_map(lambda part: part[0], default_collate([given, given])),
    ]  # fmt: skip
    for found in ways:
        assert type(found) is TaskBatch and len(found) == len(given)
        assert all(torch.equal(a, b) for a, b in zip(found, given, strict=True))
    wide = given.to(torch.float64)
    assert [part.dtype for part in wide] == [torch.float64, torch.int64] * 2 + [torch.bool] * (2 * masked)
    assert (given.query_mask is not None) is masked and given._asdict()["query_y"] is given[3]


def test_masks_are_never_dropped_without_a_word():
    support_x, *_, query_y = batch(False)
    assert support_x.shape == (2, 3, 4) and query_y.shape == (2, 3)
    with pytest.raises(ValueError, match="too many values"):
        support_x, _, _, query_y = batch(True)
    one = batch(False)._replace(query_mask=torch.ones(2, 3, dtype=torch.bool))
    assert len(one) == 6 and one.support_mask is None and "query_mask=tensor" in repr(one)


@pytest.mark.skipif(TORCH < (2, 13), reason="earlier versions of dynamo take no module for a constant")
def test_compiled():
    """torch.compile follows a learner from the batch on, without a break."""
    torch._dynamo.reset()
    maml, given = MAML(nn.Linear(4, 2), engine="layerwise"), batch(False)
    compiled = torch.compile(maml, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(given).loss, maml(given).loss)
    torch._dynamo.reset()

    def unpacked(tasks):
        support_x, support_y, query_x, query_y = tasks
        return support_x.sum() + query_x.sum()

    torch.testing.assert_close(torch.compile(unpacked, backend="eager", fullgraph=True)(given), unpacked(given))
