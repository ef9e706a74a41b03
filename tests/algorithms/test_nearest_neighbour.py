"""Nearest neighbour against a loop over rows, and that it leaves the encoder alone."""

import math

import pytest
import torch
from embedding_cases import check_protocol, class_batch, judge
from torch import nn
from torch.nn import functional as F

from fastmeta.algorithms.nearest_neighbour import NearestNeighbour
from fastmeta.nn import conv4
from fastmeta.tasks import TaskBatch, make_tasks


@pytest.mark.parametrize("rule", ["mean", "nearest"])
@pytest.mark.parametrize("centre", ["none", "support"])
@pytest.mark.parametrize("normalise", [False, True])
def test_protocol(rule, centre, normalise):
    algorithm = NearestNeighbour(nn.Flatten(), rule=rule, centre=centre, normalise=normalise)
    check_protocol(algorithm, class_batch())


@pytest.mark.parametrize("rule", ["mean", "nearest"])
@pytest.mark.parametrize("centre", ["none", "support", "given"])
@pytest.mark.parametrize("normalise", [False, True])
def test_is_the_formula(rule, centre, normalise):
    torch.manual_seed(0)
    encoder, batch = nn.Linear(5, 4), class_batch(shots=3)
    given = torch.randn(4)
    algorithm = NearestNeighbour(
        encoder, rule=rule, centre=given if centre == "given" else centre, normalise=normalise, ways=3
    )
    logits = algorithm(batch).logits
    for task in range(4):
        with torch.no_grad():
            support, query = encoder(batch.support_x[task]), encoder(batch.query_x[task])
        mean = {"none": torch.zeros(4), "support": support.mean(0), "given": given}[centre]
        support, query = support - mean, query - mean
        if normalise:
            support, query = F.normalize(support, dim=1), F.normalize(query, dim=1)
        for row in range(len(query)):
            for n in range(3):
                members = support[batch.support_y[task] == n]
                if rule == "mean":
                    members = members.mean(0, keepdim=True)
                nearest = (query[row] - members).square().sum(1).min()
                torch.testing.assert_close(logits[task, row, n], -nearest, rtol=1e-4, atol=1e-5)


def test_encoder_stays_frozen():
    algorithm = NearestNeighbour(conv4(hidden=4), ways=2)
    before = {name: tensor.clone() for name, tensor in algorithm.state_dict().items()}
    algorithm.train()
    assert algorithm.training and not algorithm.encoder.training
    x, y = torch.randn(2, 4, 1, 16, 16), torch.arange(2).repeat(2).expand(2, 4)
    output = algorithm(TaskBatch(x, y, x, y))
    assert not output.loss.requires_grad
    for name, tensor in algorithm.state_dict().items():
        assert torch.equal(tensor, before[name]), name  # the running statistics among them


def test_given_centre_is_saved():
    algorithm = NearestNeighbour(nn.Flatten(), centre=torch.ones(5))
    other = NearestNeighbour(nn.Flatten(), centre=torch.zeros(5))
    other.load_state_dict(algorithm.state_dict())
    assert torch.equal(other.mean, torch.ones(5))


def test_other_ways_at_test_and_absent_classes():
    algorithm = NearestNeighbour(nn.Flatten(), rule="nearest", ways=4)
    assert (algorithm(class_batch(ways=3)).logits[..., 3] == -math.inf).all()
    algorithm.ways = None
    assert algorithm(class_batch(ways=6)).logits.shape == (4, 18, 6)


def test_arguments_are_checked():
    batch = class_batch()
    with pytest.raises(ValueError, match="rule"):
        NearestNeighbour(nn.Flatten(), rule="median")
    with pytest.raises(ValueError, match="centre"):
        NearestNeighbour(nn.Flatten(), centre="query")
    with pytest.raises(ValueError, match="centre"):
        NearestNeighbour(nn.Flatten(), centre=torch.zeros(1, 5))
    with pytest.raises(ValueError, match="centre"):
        NearestNeighbour(nn.Flatten(), centre=torch.zeros(6))(batch)
    with pytest.raises(ValueError, match="metric"):
        NearestNeighbour(nn.Flatten(), metric="near")
    with pytest.raises(ValueError, match="support_y.*2"):
        NearestNeighbour(nn.Flatten(), ways=2)(batch)


def test_transforms_help_where_they_should():
    """Rows that share a large offset and differ in length: the angle after centring tells the classes apart."""

    def sample(seed):
        batch = class_batch(16, 5, 5, 5, 20, 0.8, seed)
        length = torch.Generator().manual_seed(seed + 1)
        support, query = (
            x * torch.empty(*x.shape[:2], 1).uniform_(0.1, 4, generator=length) + 5
            for x in (batch.support_x, batch.query_x)
        )
        return batch._replace(support_x=support, query_x=query)

    def accuracy(**options):
        return judge(NearestNeighbour(nn.Flatten(), ways=5, **options), sample)

    plain, given = accuracy(), accuracy(centre=torch.full((20,), 5.0), normalise=True)
    assert given > plain + 0.03 and given > accuracy(normalise=True) + 0.03
    assert accuracy(centre="support", normalise=True) > plain + 0.03


@pytest.mark.parametrize("rule", ["mean", "nearest"])
def test_pixels_are_a_baseline_above_chance(rule):
    tasks = make_tasks("glyphs", "test", ways=5, shots=3, query_shots=5)
    batch = tasks.sample(100, generator=torch.Generator().manual_seed(0))
    accuracy = NearestNeighbour(nn.Flatten(), rule=rule, ways=5)(batch).accuracy.mean()
    assert 0.4 < accuracy < 0.9
