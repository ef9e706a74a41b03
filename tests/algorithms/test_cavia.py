"""CAVIA against a loop over tasks in plain words, its forms of context, and that the context is what adapts."""

import pytest
import torch
from inner_loop_checks import (
    LOSSES,
    assert_keeps_the_protocol,
    assert_same_meta_gradient,
    assert_saves_and_loads,
    class_batch,
    sinusoid_error,
    small_mlp,
    train_on_sinusoids,
    value_batch,
)
from torch import nn

from fastmeta.algorithms import CAVIA, ContextFiLM, ContextFiLMConv4
from fastmeta.nn import mlp


class Residual(nn.Module):
    """Of rows with their context; no chain of layers."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(7, 7), nn.LayerNorm(7), nn.Linear(7, 3)

    def forward(self, x):
        return self.second(x + torch.tanh(self.norm(self.first(x))))


class SmallFiLM(nn.Module):
    """Of 1x6x6 images and a context of 2."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)
        self.film, self.head = ContextFiLM(2, 3), nn.Linear(12, 3)

    def forward(self, x, context):
        h = torch.tanh(self.film(self.norm(self.convolution(x)), context))
        return self.head(nn.functional.max_pool2d(h, 2).flatten(1))


NETS = {
    "mlp": (lambda seed=0: small_mlp((7, 8, 6, 3), seed), (5,), True),
    "residual": (Residual, (5,), True),
    "film": (SmallFiLM, (1, 6, 6), False),
}


def build(net, seed=0, **options):
    torch.manual_seed(seed)
    function, shape, concatenate = NETS[net]
    return CAVIA(function().double(), 2, concatenate=concatenate, **options), shape


def plain_loop(algorithm, batch, loss="cross_entropy"):
    def predict(x, context):
        if algorithm.concatenate:
            return algorithm.model(torch.cat([x, context.expand(len(x), -1)], 1))
        return algorithm.model(x, context)

    losses = []
    for sx, sy, qx, qy in zip(*batch, strict=True):
        context = torch.zeros(algorithm.context_size, dtype=sx.dtype, requires_grad=True)
        for _ in range(algorithm.inner_steps):
            value = LOSSES[loss](predict(sx, context), sy)
            (gradient,) = torch.autograd.grad(value, context, create_graph=not algorithm.first_order)
            context = context - algorithm.inner_lr * gradient
        losses.append(LOSSES[loss](predict(qx, context), qy))
    return torch.stack(losses)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("first_order", [False, True])
def test_equals_the_loop_over_tasks(net, steps, first_order):
    algorithm, shape = build(net, inner_steps=steps, first_order=first_order, inner_lr=0.7)
    batch = class_batch(shape=shape)
    assert_same_meta_gradient(algorithm, batch, plain_loop(algorithm, batch))


@pytest.mark.parametrize("custom", [False, True])
def test_regression_and_a_loss_of_ones_own(custom):
    loss = (lambda p, t: nn.functional.mse_loss(p, t)) if custom else "mse"
    algorithm, batch = CAVIA(small_mlp((8, 9, 2)), 3, inner_steps=2, loss=loss), value_batch()
    assert_same_meta_gradient(algorithm, batch, plain_loop(algorithm, batch, "mse"))


@pytest.mark.parametrize("net", NETS)
def test_protocol(net):
    algorithm, shape = build(net, inner_steps=2)
    batch = class_batch(shape=shape)
    assert_keeps_the_protocol(algorithm, batch)
    state = algorithm.adapt(batch.support_x, batch.support_y)
    assert state.context.shape == (3, 2) and state.context.all()
    algorithm.inner_steps = 0
    assert not algorithm.adapt(batch.support_x, batch.support_y).context.any()


def test_chunks_of_tasks_give_the_same_gradient():
    batch = class_batch(tasks=5)
    (whole, _), (parts, _) = build("mlp"), build("mlp", task_chunk=2)
    whole(batch).loss.backward()
    parts(batch).loss.backward()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_saves_and_loads():
    assert_saves_and_loads(build("film", 1)[0], build("film")[0], class_batch(shape=(1, 6, 6)))


def test_film():
    film, h = ContextFiLM(2, 3), torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(film(h, torch.zeros(2)), h)
    context = torch.tensor([1.0, -2.0])
    gamma, beta = (film.modulation.weight @ context).chunk(2)
    expected = (1 + gamma[:, None, None]) * h + beta[:, None, None]
    torch.testing.assert_close(film(h, context), expected)
    torch.testing.assert_close(film(h[..., 0, 0], context), expected[..., 0, 0])


@pytest.mark.parametrize("film_after", [1, 4])
def test_film_conv4(film_after):
    net = ContextFiLMConv4(5, 10, hidden=4, film_after=film_after, in_channels=3, image_size=36)
    algorithm = CAVIA(net, 10, concatenate=False, inner_steps=2)
    batch = class_batch(tasks=2, ways=5, shape=(3, 36, 36), dtype=torch.float32)
    algorithm(batch).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert net.film.modulation.weight.grad.any()
    algorithm.eval()(batch)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="context_size must be at least 1"):
        CAVIA(mlp([6, 3]), 0)
    with pytest.raises(ValueError, match="film_after"):
        ContextFiLMConv4(5, film_after=5)
    with pytest.raises(ValueError, match="image_size"):
        ContextFiLMConv4(5, image_size=8)
    batch = class_batch()
    with pytest.raises(ValueError, match="the model takes 8 features, but an input has 5 and its context 2"):
        CAVIA(small_mlp((8, 3)), 2)(batch)
    with pytest.raises(ValueError, match="the context joins rows"):
        CAVIA(small_mlp((8, 3)), 2)(class_batch(shape=(1, 2, 2)))
    for net in ("mlp", "residual"):
        algorithm, _ = build(net, loss="mse")
        with pytest.raises(ValueError, match="support_y: mse"):
            algorithm(batch)
    algorithm, _ = build("mlp")
    with pytest.raises(ValueError, match="query_y: cross_entropy"):
        algorithm(batch._replace(query_y=batch.query_y.int()))
    with pytest.raises(ValueError, match="tasks"):
        algorithm.predict(algorithm.adapt(batch.support_x, batch.support_y), batch.query_x[:2])


@pytest.mark.learning
def test_learns_sinusoids():
    torch.manual_seed(0)
    algorithm = CAVIA(mlp([6, 40, 40, 1]), 5, loss="mse")
    train_on_sinusoids(algorithm, 800, lr=5e-3)
    adapted, before = sinusoid_error(algorithm), sinusoid_error(algorithm, 0)
    assert adapted < 0.8 and adapted < before / 4, (adapted, before)
