"""The fused loss against its parts, its ties and limits, and what it keeps for the backward."""

import pytest
import torch
from conftest import DEVICE
from test_ops import BACKENDS, require
from torch.nn import functional as F

from fastmeta import use_backend
from fastmeta.dispatch.backends import METRICS
from fastmeta.dispatch.spec import Make
from fastmeta.functional import class_prototypes, pairwise_distance, prototypical_loss

metrics = pytest.mark.parametrize("metric", METRICS)


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    require(request.param)
    with use_backend(request.param):
        yield request.param


def composed(support, support_labels, query, query_labels, num_classes, metric):
    logits = -pairwise_distance(query, class_prototypes(support, support_labels, num_classes), metric)
    loss = torch.stack([F.cross_entropy(z, y) for z, y in zip(logits, query_labels, strict=True)])
    return loss, (logits.argmax(-1) == query_labels).to(loss.dtype).mean(-1)


def episode(dtype=torch.float64, tasks=3, ways=5, shots=3, queries=11, width=6):
    make = Make(dtype, DEVICE)
    support_labels = make.balanced_labels(tasks, ways, shots)
    return (
        make.normal(tasks, ways * shots, width),
        support_labels,
        make.normal(tasks, queries, width),
        make.labels(ways, tasks, queries),
    )


@metrics
def test_equals_its_parts(metric):
    support, support_labels, query, query_labels = episode()
    leaves = [support.requires_grad_(), query.requires_grad_()]
    weight = Make(torch.float64, DEVICE, 1).normal(3)
    results = []
    for function in (prototypical_loss, composed):
        loss, accuracy = function(support, support_labels, query, query_labels, 5, metric)
        results.append((loss, accuracy, *torch.autograd.grad((loss * weight).sum(), leaves)))
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-12)
    assert 0 < results[0][1].mean() < 1  # an accuracy of 0 or 1 would be no test


@metrics
@pytest.mark.parametrize("ways", [3, 20])
def test_of_equally_near_classes_the_first_wins(metric, ways):
    """Whole numbers on one axis: no rounding decides. All classes but 0 lie at the same, nearest point."""
    near, far = [2.0, 0.0], [0.0, 0.0] if metric == "dot" else [-4.0, 0.0]
    support = torch.tensor([[far] + [near] * (ways - 1)], device=DEVICE)
    labels = torch.arange(ways, device=DEVICE)
    query = torch.tensor([[near] * ways], device=DEVICE)
    for query_labels, expected in ((torch.ones_like(labels), 1), (labels, 1 / ways)):
        accuracy = prototypical_loss(support, labels[None], query, query_labels[None], ways, metric)[1]
        assert accuracy.item() == torch.tensor(expected).item()


def test_accuracy_has_no_gradient():
    support, support_labels, query, query_labels = episode()
    loss, accuracy = prototypical_loss(support.requires_grad_(), support_labels, query, query_labels, 5)
    assert loss.requires_grad and not accuracy.requires_grad


@metrics
def test_no_queries_give_nan(metric):
    support, support_labels, query, query_labels = episode(queries=0)
    loss, accuracy = prototypical_loss(support, support_labels, query, query_labels, 5, metric)
    assert loss.shape == accuracy.shape == (3,)
    assert loss.isnan().all() and accuracy.isnan().all()


def test_far_queries_neither_overflow_nor_vanish():
    """exp of a distance of 1e6 is 0 in any precision: the logarithm of the sum must not see it."""
    support = torch.tensor([[[0.0], [1.0]]], device=DEVICE)
    query = torch.tensor([[[1000.0]]], device=DEVICE, requires_grad=True)
    zero, one = (torch.full((1, 1), y, device=DEVICE) for y in (0, 1))
    labels = torch.tensor([[0, 1]], device=DEVICE)
    right, wrong = (prototypical_loss(support, labels, query, y, 2)[0] for y in (one, zero))
    assert right.item() == 0 and wrong.item() == 1000**2 - 999**2
    # d/dq of (q - 0)^2 - (q - 1)^2 = 2
    assert torch.autograd.grad(wrong.sum(), query)[0].item() == 2


@metrics
def test_keeps_no_distances_for_the_backward(metric):
    tasks, ways, shots, queries, width = 2, 13, 2, 17, 3
    support, support_labels, query, query_labels = episode(torch.float32, tasks, ways, shots, queries, width)
    support.requires_grad_(), query.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.untyped_storage().nbytes()) or t, lambda t: t
    ):
        loss, _ = prototypical_loss(support, support_labels, query, query_labels, ways, metric)
    inputs = [t.untyped_storage().nbytes() for t in (support, support_labels, query, query_labels)]
    assert kept and max(kept) < tasks * queries * ways * 4  # bytes of one [T, Q, N] in float32
    assert sum(kept) <= sum(inputs)
    assert torch.autograd.grad(loss.sum(), support)[0].any()


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
@pytest.mark.parametrize("spread", [1, 10, 100])
def test_close_classes_in_a_wide_spread_keep_their_digits(spread, metric):
    """Pairs of classes 0.1 apart, far from the others: what tells them apart is what products of large rows round off.
    One row a class, so that the prototypes are exact."""
    make = Make(torch.float64, DEVICE)
    tasks, pairs, queries, width = 2, 10, 3, 64
    centres = spread * make.normal(tasks, pairs, 1, width)
    support = (centres + 0.1 * make.normal(tasks, pairs, 2, width)).flatten(1, 2).float()
    offsets = 0.1 * make.normal(tasks, 2 * pairs, queries, width)
    query = (support.double().unsqueeze(2) + offsets).flatten(1, 2).float()
    labels = make.balanced_labels(tasks, 2 * pairs, 1), make.balanced_labels(tasks, 2 * pairs, queries)

    def results(loss, dtype):
        rows = [t.to(dtype).requires_grad_() for t in (support, query)]
        value = loss(rows[0], labels[0], rows[1], labels[1], 2 * pairs, metric)[0]
        return value.detach(), *torch.autograd.grad(value.sum(), rows)

    truth = results(composed, torch.float64)
    for value, right in zip(results(prototypical_loss, torch.float32), truth, strict=True):
        assert (value - right).abs().max() < 4e-6 * right.abs().max()
