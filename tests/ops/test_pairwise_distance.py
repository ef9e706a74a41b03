"""Distances: equal points, far offsets, torch's own forms, and second order where `torch.cdist` has none."""

import pytest
import torch
from conftest import DEVICE
from plain import pairwise_distance as by_loop
from test_ops import BACKENDS, require
from torch.autograd import gradgradcheck
from torch.nn import functional as F

from fastmeta import use_backend
from fastmeta.dispatch.backends import METRICS
from fastmeta.dispatch.spec import Make
from fastmeta.functional import pairwise_distance

OF_DIFFERENCES = ("sqeuclidean", "euclidean", "manhattan")
EXACT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    require(request.param)
    with use_backend(request.param):
        yield request.param


def points(*shape, dtype=torch.float64, seed=0):
    return Make(dtype, DEVICE, seed).normal(*shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("metric", OF_DIFFERENCES)
def test_equal_points_are_at_distance_0_with_gradient_0(metric, dtype):
    query = points(2, 7, 33, dtype=dtype).requires_grad_()
    prototypes = query.detach().clone().requires_grad_()
    distance = pairwise_distance(query, prototypes, metric)
    own = distance.diagonal(dim1=1, dim2=2)
    assert torch.equal(own, torch.zeros_like(own))
    assert torch.count_nonzero(distance) == 2 * 7 * 6
    for gradient in torch.autograd.grad(own.sum(), (query, prototypes)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("metric", OF_DIFFERENCES)
def test_equal_points_have_finite_second_derivatives(metric):
    weight, direction = points(2, 4, 4, seed=1), points(2, 4, 5, seed=2)

    def second_order(function):
        leaves = [points(2, 4, 5).requires_grad_() for _ in range(2)]  # twice the same points
        value = (function(*leaves, metric) * weight).sum()
        first = torch.autograd.grad(value, leaves, create_graph=True)
        # the square keeps manhattan, whose gradient is constant, in the graph
        total = sum((g * direction).sum() for g in first) + sum(leaf.square().sum() for leaf in leaves)
        return [*first, *torch.autograd.grad(total, leaves)]

    for ours, truth in zip(second_order(pairwise_distance), second_order(by_loop), strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, truth, **EXACT)


@pytest.mark.parametrize("metric", OF_DIFFERENCES)
def test_far_offset_costs_no_digits(metric):
    """|q|^2 + |p|^2 - 2 q.p would be off by hundreds here, and negative."""
    query = 1e4 + 1e-3 * points(2, 6, 17, dtype=torch.float32)
    prototypes = 1e4 + 1e-3 * points(2, 5, 17, dtype=torch.float32, seed=1)
    distance = pairwise_distance(query, prototypes, metric)
    assert (distance >= 0).all()
    truth = by_loop(query.double(), prototypes.double(), metric)
    torch.testing.assert_close(distance.double(), truth, rtol=1e-5, atol=0)


def torch_form(query, prototypes, metric):
    if metric == "cosine":
        return 1 - F.cosine_similarity(query.unsqueeze(2), prototypes.unsqueeze(1), dim=-1)
    if metric == "dot":
        return -torch.einsum("tqd,tnd->tqn", query, prototypes)
    distance = torch.cdist(
        query, prototypes, p=1 if metric == "manhattan" else 2, compute_mode="donot_use_mm_for_euclid_dist"
    )
    return distance.square() if metric == "sqeuclidean" else distance


@pytest.mark.parametrize("metric", METRICS)
def test_equals_torch_forms(metric):
    query, prototypes, weight = points(3, 9, 5), points(3, 4, 5, seed=1), points(3, 9, 4, seed=2)

    def value_and_gradients(function):
        leaves = [query.clone().requires_grad_(), prototypes.clone().requires_grad_()]
        value = function(*leaves, metric)
        return value, *torch.autograd.grad((value * weight).sum(), leaves)

    for ours, theirs in zip(value_and_gradients(pairwise_distance), value_and_gradients(torch_form), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_cosine_of_vectors_shorter_than_eps():
    """Their norm counts as eps, a constant; the zero vector is at a right angle to everything."""
    query = torch.tensor([[[0.0, 0.0], [3e-9, 0.0], [1.0, 2.0]]], dtype=torch.float64, device=DEVICE)
    prototypes = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]], dtype=torch.float64, device=DEVICE)
    distance = pairwise_distance(query.requires_grad_(), prototypes, "cosine")
    torch.testing.assert_close(distance, torch_form(query, prototypes, "cosine"), **EXACT)
    assert torch.equal(distance[0, 0], torch.ones_like(distance[0, 0]))
    gradient = torch.autograd.grad(distance[..., 0].sum(), query)[0]
    short = -prototypes[0, 0] / 2**0.5 / 1e-8
    torch.testing.assert_close(gradient[0, :2], short.expand(2, 2), **EXACT)


@pytest.mark.parametrize("rows", [(5, 5), (25, 25), (26, 5)])
@pytest.mark.parametrize("metric", ["euclidean", "manhattan"])
def test_twice_differentiable_at_every_size(metric, rows):
    """`torch.cdist` changes its form at 25 rows, and has a second derivative on one side only."""
    leaves = [points(1, n, 3, seed=n + i).requires_grad_() for i, n in enumerate(rows)]
    assert gradgradcheck(lambda q, p: pairwise_distance(q, p, metric), leaves, fast_mode=True)
