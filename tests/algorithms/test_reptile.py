"""Reptile against torch's own optimisers on one task at a time, its minibatches, its gradient, that it learns."""

import pytest
import torch
from inner_loop_checks import (
    NETS,
    assert_keeps_the_protocol,
    assert_saves_and_loads,
    class_batch,
    sinusoid_error,
    small_mlp,
    value_batch,
)
from torch.func import functional_call
from torch.nn import functional as F

from fastmeta.algorithms.reptile import Reptile
from fastmeta.nn import mlp
from fastmeta.tasks import make_tasks


def train_plainly(algorithm, start, x, y, order, loss=F.cross_entropy):
    """One task's weights after training with `torch.optim`; `order` `[K, B]` says which rows a step takes."""
    weights = {name: w.detach().clone().requires_grad_() for name, w in start.items()}
    if algorithm.optimizer == "sgd":
        optimizer = torch.optim.SGD(weights.values(), lr=algorithm.inner_lr)
    else:
        optimizer = torch.optim.Adam(weights.values(), lr=algorithm.inner_lr, betas=(0.0, 0.999))
    for rows in order:
        optimizer.zero_grad()
        loss(functional_call(algorithm.model, weights, (x[rows],)), y[rows]).backward()
        optimizer.step()
    return {name: w.detach() for name, w in weights.items()}


def orders(algorithm, monkeypatch):
    """What the algorithm draws, call by call, each `[K, T, B]`."""
    drawn, draw = [], algorithm._order

    def remember(tasks, rows, device):
        order = draw(tasks, rows, device)
        if order is None:
            order = torch.arange(rows).expand(algorithm.inner_steps, tasks, -1)
        drawn.append(order)
        return order

    monkeypatch.setattr(algorithm, "_order", remember)
    return drawn


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("train_on", ["all", "support"])
def test_equals_the_loop_over_tasks(net, optimizer, batch_size, train_on, monkeypatch):
    build, shape = NETS[net]
    algorithm = Reptile(build(), inner_lr=0.05, inner_steps=5, optimizer=optimizer, batch_size=batch_size,
                        train_on=train_on)  # fmt: skip
    batch, slow = class_batch(shape=shape), {n: p.detach().clone() for n, p in algorithm.model.named_parameters()}
    drawn = orders(algorithm, monkeypatch)
    output = algorithm(batch)
    (3 * output.loss).backward()
    x, y = batch.support_x, batch.support_y
    if train_on == "all":
        x, y = torch.cat([x, batch.query_x], 1), torch.cat([y, batch.query_y], 1)
    fast = [train_plainly(algorithm, slow, x[t], y[t], drawn[0][:, t]) for t in range(batch.num_tasks)]
    for name, p in algorithm.model.named_parameters():
        step = slow[name] - torch.stack([w[name] for w in fast]).mean(0)
        torch.testing.assert_close(p.grad, 3 * step, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(p.detach(), slow[name], rtol=0, atol=0)
    losses = [
        F.cross_entropy(functional_call(algorithm.model, w, (qx,)), qy)
        for w, qx, qy in zip(fast, batch.query_x, batch.query_y, strict=True)
    ]
    torch.testing.assert_close(output.task_loss, torch.stack(losses).detach(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_one_task_after_another(optimizer, monkeypatch):
    algorithm = Reptile(small_mlp(), inner_lr=0.05, optimizer=optimizer, batch_size=3, serial=True, serial_rate=0.3)
    batch, slow = class_batch(), {n: p.detach().clone() for n, p in algorithm.model.named_parameters()}
    drawn = orders(algorithm, monkeypatch)
    algorithm(batch).loss.backward()
    x, y = torch.cat([batch.support_x, batch.query_x], 1), torch.cat([batch.support_y, batch.query_y], 1)
    moved = dict(slow)
    for task in range(batch.num_tasks):
        fast = train_plainly(algorithm, moved, x[task], y[task], drawn[task][:, 0])
        moved = {name: w + 0.3 * (fast[name] - w) for name, w in moved.items()}
    for name, p in algorithm.model.named_parameters():
        torch.testing.assert_close(p.grad, slow[name] - moved[name], rtol=1e-8, atol=1e-8)
    optimizer = torch.optim.SGD(algorithm.parameters(), lr=1.0)
    optimizer.step()
    for name, p in algorithm.model.named_parameters():
        torch.testing.assert_close(p.detach(), moved[name], rtol=1e-8, atol=1e-8)


def test_with_one_task_both_versions_are_the_same():
    batch = class_batch(tasks=1)
    both = [Reptile(small_mlp(), batch_size=None, inner_lr=0.05, serial=s, serial_rate=1.0) for s in (True, False)]
    for algorithm in both:
        algorithm(batch).loss.backward()
    for a, b in zip(both[0].parameters(), both[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_minibatches_use_every_row_before_any_again():
    algorithm = Reptile(mlp([5, 3]), inner_steps=6, batch_size=2)
    order = algorithm._order(50, 4, torch.device("cpu"))
    assert order.shape == (6, 50, 2)
    rounds = order.transpose(0, 1).reshape(50, 3, 4)
    assert (rounds.sort(-1).values == torch.arange(4)).all()
    assert len({tuple(task.flatten().tolist()) for task in rounds}) > 40
    assert (order != algorithm._order(50, 4, torch.device("cpu"))).any()
    algorithm.eval()
    order = algorithm._order(50, 4, torch.device("cpu"))
    assert (order == order[:, :1]).all() and (order == algorithm._order(50, 4, torch.device("cpu"))).all()
    algorithm.batch_size = 10
    assert algorithm._order(2, 4, torch.device("cpu")).shape == (6, 2, 10)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("batch_size", [None, 4])
def test_protocol(net, batch_size):
    build, shape = NETS[net]
    algorithm = Reptile(build(), inner_lr=0.05, inner_steps=3, batch_size=batch_size).eval()
    assert_keeps_the_protocol(algorithm, class_batch(shape=shape))


def test_without_steps_nothing_moves():
    algorithm, batch = Reptile(small_mlp(), inner_steps=0), class_batch()
    algorithm(batch).loss.backward()
    assert not any(p.grad.any() for p in algorithm.parameters())


def test_frozen_parameters_stay():
    model, batch = small_mlp(), class_batch()
    for p in model[1].parameters():
        p.requires_grad_(False)
    algorithm = Reptile(model, inner_lr=0.05)
    algorithm(batch).loss.backward()
    assert [p.grad is None for p in model.parameters()] == [True] * 2 + [False] * 4
    assert algorithm.adapt(batch.support_x, batch.support_y).shared == {"1.weight", "1.bias"}


def test_a_loss_of_ones_own():
    grads = []
    for loss in ("mse", lambda p, t: F.mse_loss(p, t)):
        algorithm = Reptile(small_mlp((5, 6, 2)), inner_lr=0.05, batch_size=None, loss=loss)
        algorithm(value_batch()).loss.backward()
        grads.append([p.grad for p in algorithm.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-8)


def test_the_gradient_cannot_be_differentiated_again():
    algorithm = Reptile(small_mlp())
    loss = algorithm(class_batch()).loss
    gradients = torch.autograd.grad(loss, list(algorithm.parameters()), create_graph=True)
    with pytest.raises(RuntimeError):
        sum(g.sum() for g in gradients).backward()


def test_saves_and_loads():
    one, other = (Reptile(small_mlp(seed=seed), inner_lr=0.05).eval() for seed in (1, 0))
    assert_saves_and_loads(one, other, class_batch())


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="optimizer must be one of"):
        Reptile(mlp([5, 3]), optimizer="momentum")
    with pytest.raises(ValueError, match="train_on must be one of"):
        Reptile(mlp([5, 3]), train_on="query")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Reptile(mlp([5, 3]), batch_size=0)
    with pytest.raises(TypeError, match="serial_rate must be a number"):
        Reptile(mlp([5, 3]), serial_rate=None)
    batch = class_batch()
    for net in NETS:
        build, shape = NETS[net]
        with pytest.raises(ValueError, match="support_y: mse"):
            Reptile(build(), loss="mse")(class_batch(shape=shape))
    with pytest.raises(ValueError, match="query_x has 2"):
        Reptile(small_mlp())(batch._replace(query_x=batch.query_x[:2], query_y=batch.query_y[:2]))


@pytest.mark.learning
def test_learns_sinusoids():
    """Judged after as many steps on the support rows as the paper's figure has, 32."""
    torch.manual_seed(0)
    algorithm = Reptile(mlp([1, 40, 40, 1], "tanh"), inner_lr=0.02, inner_steps=8, optimizer="sgd", loss="mse")
    source, generator = make_tasks("sinusoid", shots=10), torch.Generator().manual_seed(1)
    before = sinusoid_error(algorithm, 32)
    optimizer = torch.optim.SGD(algorithm.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 400)
    for _ in range(400):
        optimizer.zero_grad()
        algorithm(source.sample(10, generator=generator)).loss.backward()
        optimizer.step()
        schedule.step()
    after = sinusoid_error(algorithm, 32)
    assert after < 0.9 and after < before / 2, (after, before)
