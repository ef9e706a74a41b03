"""The ridge head against the normal equations of one task at a time, and that the encoder learns through it."""

import pytest
import torch
from embedding_cases import check_protocol, class_batch, hidden_signal, judge, sinusoids, train
from torch import nn
from torch.nn import functional as F

from fastmeta.algorithms.ridge import RidgeHead, ridge_weights
from fastmeta.nn import mlp


def head(width=4, **options):
    torch.manual_seed(0)
    options = {"ways": 3} | options
    return RidgeHead(mlp([5, 8, width], "tanh"), **options)


@pytest.mark.parametrize("width", [4, 12])  # S = 6: more rows than columns, and fewer
def test_protocol(width):
    algorithm, batch = head(width), class_batch()
    output = algorithm(batch)
    parameters = dict(algorithm.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(output.loss, list(parameters.values())), strict=True))
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    # a bias that all classes share does not change the cross entropy
    assert all(gradient.abs().max() > 0 for name, gradient in gradients.items() if name != "bias")
    with torch.no_grad():
        check_protocol(algorithm, batch)


def test_protocol_of_regression():
    torch.manual_seed(0)
    check_protocol(RidgeHead(mlp([1, 20, 12], "tanh"), loss="mse", ways=7), sinusoids(0, tasks=4))


@pytest.mark.parametrize("width", [4, 12])
def test_is_the_formula(width):
    algorithm, batch = head(width, ridge=0.3, scale=2.0, bias=0.5).double(), class_batch(dtype=torch.float64)
    output = algorithm(batch)
    for task in range(4):
        x, query = algorithm.encoder(batch.support_x[task]), algorithm.encoder(batch.query_x[task])
        y = F.one_hot(batch.support_y[task], 3).double()
        weights = torch.linalg.inv(x.T @ x + 0.3 * torch.eye(width)) @ x.T @ y
        logits = 2 * query @ weights + 0.5
        torch.testing.assert_close(output.logits[task], logits, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(output.task_loss[task], F.cross_entropy(logits, batch.query_y[task]))


@pytest.mark.parametrize("rows, columns", [(3, 7), (7, 3), (5, 5), (1, 1), (1, 4)])
def test_weights_minimise_what_they_should(rows, columns):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, rows, columns, dtype=torch.float64, generator=generator)
    y = torch.randn(2, rows, 2, dtype=torch.float64, generator=generator)
    ridge = torch.tensor(0.2, dtype=torch.float64)
    weights = ridge_weights(x, y, ridge).requires_grad_()
    assert weights.shape == (2, columns, 2)
    cost = (x @ weights - y).square().sum() + ridge * weights.square().sum()
    (gradient,) = torch.autograd.grad(cost, weights)
    assert gradient.abs().max() < 1e-10


def test_gradients():
    generator = torch.Generator().manual_seed(0)
    ridge = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    for rows in (2, 4):
        x = torch.randn(2, rows, 3, dtype=torch.float64, generator=generator, requires_grad=True)
        y = torch.randn(2, rows, 2, dtype=torch.float64, generator=generator, requires_grad=True)
        assert torch.autograd.gradcheck(ridge_weights, (x, y, ridge))


def test_other_ways_and_shots_at_test():
    algorithm = head(ways=None)
    assert algorithm(class_batch(ways=3)).logits.shape == (4, 9, 3)
    assert algorithm(class_batch(ways=6, shots=1)).logits.shape == (4, 18, 6)


def test_autocast_solves_in_float32():
    algorithm, batch = head(12), class_batch()
    with torch.autocast("cpu", torch.bfloat16):
        assert algorithm.adapt(batch.support_x, batch.support_y).weights.dtype == torch.float32
        assert algorithm(batch).loss.isfinite()


def test_arguments_are_checked():
    batch = class_batch()
    with pytest.raises(ValueError, match="ridge"):
        head(ridge=0)
    with pytest.raises(ValueError, match="loss"):
        head(loss="hinge")
    with pytest.raises(ValueError, match="encoder"):
        RidgeHead(nn.Unflatten(1, (5, 1)))(batch)
    with pytest.raises(ValueError, match="support_y.*2"):
        head(ways=2)(batch)
    with pytest.raises(ValueError, match="query_y.*7"):
        head()(batch._replace(query_y=batch.query_y.clone().fill_(7)))
    with pytest.raises(TypeError, match="support_y"):
        head(loss="mse")(batch)
    numbers = sinusoids(0, tasks=2)
    regression = RidgeHead(mlp([1, 4]), loss="mse")
    with pytest.raises(ValueError, match="support_y"):
        regression(numbers._replace(support_y=numbers.support_y[:, :3]))
    with pytest.raises(ValueError, match="query_y"):
        regression(numbers._replace(query_y=numbers.query_y.expand(-1, -1, 2)))


@pytest.mark.learning
def test_learns_which_directions_matter():
    torch.manual_seed(0)
    algorithm = RidgeHead(mlp([20, 32, 8]), ways=5)
    before = judge(algorithm, hidden_signal)
    train(algorithm, hidden_signal, 200)
    after = judge(algorithm, hidden_signal)
    assert before < 0.4 and after > 0.85, (before, after)


@pytest.mark.learning
def test_learns_sinusoids():
    """Sinusoids of one period span two dimensions: ten points fix them."""
    torch.manual_seed(0)
    algorithm = RidgeHead(mlp([1, 40, 40, 8], "tanh"), loss="mse", ridge=0.1)
    before = judge(algorithm, sinusoids)
    train(algorithm, sinusoids, 300)
    after = judge(algorithm, sinusoids)
    assert before > 1 and after < 0.1, (before, after)
