"""Implicit MAML against dense solves and against the derivative of the inner descent itself, and that it learns."""

from functools import partial

import pytest
import torch
from inner_loop_checks import (
    LOSSES,
    NETS,
    assert_keeps_the_protocol,
    assert_saves_and_loads,
    class_batch,
    sinusoid_error,
    small_mlp,
    train_on_sinusoids,
    value_batch,
)
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn import functional as F

from fastmeta.algorithms.imaml import ImplicitMAML, conjugate_gradients
from fastmeta.nn import mlp


def descend(algorithm, sx, sy, loss="cross_entropy", create_graph=False):
    """One task's weights after gradient descent on its regularised support loss."""
    slow = dict(algorithm.model.named_parameters())
    fast = {name: p + 0 for name, p in slow.items()}
    for _ in range(algorithm.inner_steps):
        value = LOSSES[loss](functional_call(algorithm.model, fast, (sx,)), sy)
        distance = sum((w - slow[name]).square().sum() for name, w in fast.items())
        value = value + algorithm.regularization / 2 * distance
        gradients = torch.autograd.grad(value, list(fast.values()), create_graph=create_graph)
        fast = {n: w - algorithm.inner_lr * g for (n, w), g in zip(fast.items(), gradients, strict=True)}
    return fast


def flat(weights):
    return torch.cat([w.flatten() for w in weights.values()])


def implicit_gradient(algorithm, batch, loss="cross_entropy"):
    """Query losses `[T]`, and the mean over tasks of the dense solve."""
    losses, solutions = [], []
    for sx, sy, qx, qy in zip(*batch, strict=True):
        fast = {name: w.detach() for name, w in descend(algorithm, sx, sy, loss).items()}
        sizes = [w.numel() for w in fast.values()]

        # plain autograd: torch.func.hessian is wrong where a norm has a scale
        def of(vector, x, y, fast=fast, sizes=sizes):
            parts = zip(fast.items(), vector.split(sizes), strict=True)
            return LOSSES[loss](functional_call(algorithm.model, {n: v.view_as(w) for (n, w), v in parts}, (x,)), y)

        at = flat(fast).detach()
        matrix = torch.eye(len(at)).to(at) + hessian(partial(of, x=sx, y=sy), at) / algorithm.regularization
        losses.append(of(at, qx, qy))
        at.requires_grad_()
        solutions.append(torch.linalg.solve(matrix, torch.autograd.grad(of(at, qx, qy), at)[0]))
    return torch.stack(losses), torch.stack(solutions).mean(0)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("steps", [0, 3])
def test_equals_dense_solves_for_each_task(net, steps):
    build, shape = NETS[net]
    algorithm = ImplicitMAML(build(), inner_lr=0.1, inner_steps=steps, cg_steps=60)
    batch = class_batch(shape=shape)
    output = algorithm(batch)
    (2 * output.loss).backward()
    losses, gradient = implicit_gradient(algorithm, batch)
    torch.testing.assert_close(output.task_loss, losses, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(output.loss.detach(), losses.mean(), rtol=1e-8, atol=1e-8)
    ours = torch.cat([p.grad.flatten() for p in algorithm.model.parameters()])
    torch.testing.assert_close(ours, 2 * gradient, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("custom", [False, True])
def test_regression_and_a_loss_of_ones_own(custom):
    loss = (lambda p, t: F.mse_loss(p, t)) if custom else "mse"
    algorithm, batch = ImplicitMAML(small_mlp((5, 6, 2)), inner_lr=0.1, cg_steps=60, loss=loss), value_batch()
    algorithm(batch).loss.backward()
    ours = torch.cat([p.grad.flatten() for p in algorithm.model.parameters()])
    torch.testing.assert_close(ours, implicit_gradient(algorithm, batch, "mse")[1], rtol=1e-8, atol=1e-8)


def test_is_the_derivative_of_the_descent_once_that_has_converged():
    algorithm = ImplicitMAML(small_mlp((5, 6, 3)), inner_lr=0.2, inner_steps=120, cg_steps=60)
    batch = class_batch(tasks=2)
    algorithm(batch).loss.backward()
    losses = []
    for sx, sy, qx, qy in zip(*batch, strict=True):
        fast = descend(algorithm, sx, sy, create_graph=True)
        losses.append(F.cross_entropy(functional_call(algorithm.model, fast, (qx,)), qy))
    truth = torch.autograd.grad(torch.stack(losses).mean(), list(algorithm.model.parameters()))
    for p, gradient in zip(algorithm.model.parameters(), truth, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-6, atol=1e-8)


def test_layers_whose_second_derivatives_are_delicate():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.BatchNorm1d(4, track_running_stats=False),
                          nn.Linear(4, 3)).double()  # fmt: skip
    algorithm, batch = ImplicitMAML(model, regularization=40.0, inner_steps=2, cg_steps=60), class_batch()
    algorithm(batch).loss.backward()
    ours = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(ours, implicit_gradient(algorithm, batch)[1], rtol=1e-8, atol=1e-8)


def test_conjugate_gradients():
    torch.manual_seed(0)
    square = torch.randn(4, 6, 6, dtype=torch.float64)
    matrix = square @ square.mT + torch.eye(6).double()
    right = torch.randn(4, 6, dtype=torch.float64)
    right[1] = 0
    matrix[2] = torch.eye(6)  # solved after one step

    def times(v):
        return (matrix @ v.unsqueeze(-1)).squeeze(-1)

    truth = torch.linalg.solve(matrix, right)
    torch.testing.assert_close(conjugate_gradients(times, right, 12), truth)
    one = conjugate_gradients(times, right, 1)
    torch.testing.assert_close(one[1:3], truth[1:3])
    exact = (right * right).sum(1) / (right * times(right)).sum(1)
    torch.testing.assert_close(one[0], exact[0] * right[0])


def test_damping_is_added_to_the_regularization():
    batch = class_batch()
    grads = []
    for regularization, damping in ((2.0, 3.0), (5.0, 0.0)):
        algorithm = ImplicitMAML(small_mlp(), regularization=regularization, cg_damping=damping, inner_steps=0)
        algorithm(batch).loss.backward()
        grads.append([p.grad for p in algorithm.parameters()])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("net", NETS)
def test_protocol(net):
    build, shape = NETS[net]
    algorithm = ImplicitMAML(build(), inner_lr=0.1, inner_steps=3)
    assert_keeps_the_protocol(algorithm, class_batch(shape=shape))


def test_frozen_parameters_stay():
    model, batch = small_mlp(), class_batch()
    for p in model[1].parameters():
        p.requires_grad_(False)
    algorithm = ImplicitMAML(model, inner_lr=0.1)
    algorithm(batch).loss.backward()
    assert [p.grad is None for p in model.parameters()] == [True] * 2 + [False] * 4
    assert algorithm.adapt(batch.support_x, batch.support_y).shared == {"1.weight", "1.bias"}


def test_saves_and_loads():
    assert_saves_and_loads(ImplicitMAML(small_mlp(seed=1)), ImplicitMAML(small_mlp()), class_batch())


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="regularization must be above 0"):
        ImplicitMAML(mlp([5, 3]), regularization=0)
    with pytest.raises(ValueError, match="cg_steps must be at least 1"):
        ImplicitMAML(mlp([5, 3]), cg_steps=0)
    with pytest.raises(ValueError, match="cg_damping must be at least 0"):
        ImplicitMAML(mlp([5, 3]), cg_damping=-1.0)
    batch = class_batch()
    for build, shape in NETS.values():
        with pytest.raises(ValueError, match="support_y: mse"):
            ImplicitMAML(build(), loss="mse")(class_batch(shape=shape))
    with pytest.raises(ValueError, match="require gradients"):
        ImplicitMAML(small_mlp())(batch._replace(query_x=batch.query_x.clone().requires_grad_()))
    loss = ImplicitMAML(small_mlp())(batch).loss
    with pytest.raises(ValueError, match="query_y: cross_entropy"):
        ImplicitMAML(small_mlp())(batch._replace(query_y=batch.query_y.int()))
    assert loss.requires_grad


@pytest.mark.learning
def test_learns_sinusoids():
    torch.manual_seed(0)
    algorithm = ImplicitMAML(mlp([1, 40, 40, 1], "tanh"), regularization=1.0, inner_lr=0.02, cg_steps=2, loss="mse")
    train_on_sinusoids(algorithm, 200, lr=5e-3)
    adapted, before = sinusoid_error(algorithm), sinusoid_error(algorithm, 0)
    assert adapted < 1.1 and adapted < before / 2.5, (adapted, before)
