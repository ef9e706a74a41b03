"""The gradient head against descent written out for one task at a time, and that the encoder learns through it."""

import pytest
import torch
from embedding_cases import check_protocol, class_batch, hidden_signal, judge, train
from torch.nn import functional as F

from fastmeta.algorithms import GradientHead
from fastmeta.dispatch import backends
from fastmeta.nn import mlp


def head(width=4, **options):
    torch.manual_seed(0)
    options = {"ways": 3, "inner_lr": 2.0} | options
    return GradientHead(mlp([5, 8, width], "tanh"), **options)


def plain_losses(algorithm, batch, ways):
    """Query losses `[T]`, one task after the other, by autograd through every step."""
    losses = []
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        support, query = algorithm.encoder(support_x), algorithm.encoder(query_x)
        if algorithm.normalise:
            support, query = (x / x.norm(dim=1, keepdim=True) for x in (support, query))
        weights = torch.zeros(ways, support.shape[1], dtype=support.dtype, requires_grad=True)
        for _ in range(algorithm.inner_steps):
            loss = F.cross_entropy(support @ weights.T, support_y)
            (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)
            if algorithm.first_order:
                gradient = gradient.detach()
            weights = weights - algorithm.log_inner_lr.exp() * ways * gradient
        losses.append(F.cross_entropy(query @ weights.T, query_y))
    return torch.stack(losses)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("first_order", [False, True])
def test_is_descent_from_zero(steps, normalise, first_order):
    algorithm = head(inner_steps=steps, normalise=normalise, first_order=first_order).double()
    batch = class_batch(dtype=torch.float64)
    output, truth = algorithm(batch), plain_losses(algorithm, batch, 3)
    torch.testing.assert_close(output.task_loss, truth)
    parameters = list(algorithm.parameters())
    found = torch.autograd.grad(output.loss, parameters)
    wanted = torch.autograd.grad(truth.mean(), parameters)
    for gradient, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_runs_in_the_fused_loop():
    backends.calls.clear()
    head()(class_batch()).loss.backward()
    assert any(op == "meta_loss_mlp" for op, _ in backends.calls)


def test_no_step_knows_nothing():
    output = head(inner_steps=0)(class_batch())
    torch.testing.assert_close(output.task_loss, torch.full((4,), 3.0).log())


def test_protocol():
    check_protocol(head(), class_batch())
    check_protocol(head(12, inner_steps=3, normalise=False, inner_lr=0.1), class_batch())


def test_other_ways_and_shots_at_test():
    algorithm = head(ways=None)
    assert algorithm(class_batch(ways=3)).logits.shape == (4, 9, 3)
    assert algorithm(class_batch(ways=6, shots=1)).logits.shape == (4, 18, 6)


def test_arguments_are_checked():
    for options in ({"inner_lr": 0.0}, {"inner_lr": float("nan")}, {"inner_steps": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            head(**options)
    with pytest.raises(TypeError, match="inner_steps"):
        head(inner_steps=1.0)
    batch = class_batch()
    with pytest.raises(ValueError, match="support_y.*2"):
        head(ways=2)(batch)
    with pytest.raises(ValueError, match="query_y.*7"):
        head()(batch._replace(query_y=batch.query_y.clone().fill_(7)))


@pytest.mark.learning
def test_learns_which_directions_matter():
    torch.manual_seed(0)
    algorithm = GradientHead(mlp([20, 32, 8]), ways=5)
    before = judge(algorithm, hidden_signal)
    train(algorithm, hidden_signal, 200)
    after = judge(algorithm, hidden_signal)
    assert before < 0.4 and after > 0.85, (before, after)
    assert algorithm.log_inner_lr.exp() > 12  # the rate learns too
