"""Class means against a plain loop, with unbalanced and absent classes."""

import pytest
import torch
from conftest import DEVICE
from plain import class_prototypes as by_loop
from test_ops import BACKENDS, require

from fastmeta import use_backend
from fastmeta.dispatch.spec import Make
from fastmeta.functional import class_prototypes


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    require(request.param)
    with use_backend(request.param):
        yield request.param


# class sizes differ between classes and tasks; class 4 is absent everywhere
LABELS = [[0, 0, 0, 3, 1, 0, 2], [2, 2, 2, 2, 2, 2, 2], [3, 1, 0, 2, 3, 1, 0]]


def test_equals_a_loop_over_classes():
    labels = torch.tensor(LABELS, device=DEVICE)
    make = Make(torch.float64, DEVICE)
    embeddings, weight = make.normal(3, 7, 5).requires_grad_(), make.normal(3, 5, 5)
    ours, truth = (f(embeddings, labels, 5) for f in (class_prototypes, by_loop))
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-14)
    gradients = (torch.autograd.grad((value * weight).sum(), embeddings)[0] for value in (ours, truth))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_absent_class_is_zero_and_gets_no_gradient():
    labels = torch.tensor(LABELS, device=DEVICE)
    embeddings = Make(torch.float32, DEVICE).normal(3, 7, 5).requires_grad_()
    prototypes = class_prototypes(embeddings, labels, 5)
    absent = prototypes[:, 4]
    assert torch.equal(absent, torch.zeros_like(absent))
    assert torch.equal(torch.autograd.grad(absent.sum(), embeddings)[0], torch.zeros_like(embeddings))


def test_one_row_per_class_is_that_row():
    """One shot: no rounding, in whatever order the rows come."""
    embeddings = Make(torch.float32, DEVICE).normal(2, 5, 33)
    labels = torch.tensor([[4, 2, 0, 1, 3], [0, 1, 2, 3, 4]], device=DEVICE)
    rows = labels.unsqueeze(-1).expand_as(embeddings)
    assert torch.equal(class_prototypes(embeddings, labels, 5).gather(1, rows), embeddings)
