"""MAML++ against a loop over tasks in plain words, each of its switches, and that learned rates beat a fixed one."""

import pytest
import torch
from inner_loop_checks import (
    NETS,
    assert_keeps_the_protocol,
    assert_same_meta_gradient,
    assert_saves_and_loads,
    class_batch,
    plain_loop,
    sinusoid_error,
    small_mlp,
    train_on_sinusoids,
)
from torch import nn
from torch.nn import functional as F

from fastmeta.algorithms.maml import MAML
from fastmeta.algorithms.maml_plus_plus import BatchNormPerStep, MAMLPlusPlus
from fastmeta.nn import mlp


def rate_of(algorithm):
    def rate(step, name):
        return algorithm.inner_lr * algorithm.rates["layer/" + name.rpartition(".")[0].replace(".", "/")][step]

    return rate


def unequal(algorithm):
    """The same algorithm, every rate another."""
    with torch.no_grad():
        for rate in algorithm.rates.values():
            rate.copy_(torch.empty_like(rate).uniform_(0.5, 5.0))
    return algorithm


def plain_multi_step(algorithm, batch, weights, **options):
    return sum(
        w * plain_loop(algorithm.model, batch, rate_of(algorithm), steps=step + 1, **options)
        for step, w in enumerate(weights)
    )


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("first_order", [False, True])
def test_equals_the_loop_over_tasks(net, steps, first_order):
    build, shape = NETS[net]
    algorithm = unequal(MAMLPlusPlus(build(), inner_steps=steps, first_order=first_order, multi_step_iterations=0))
    batch = class_batch(shape=shape)
    truth = plain_loop(algorithm.model, batch, rate_of(algorithm), steps=steps, first_order=first_order)
    assert_same_meta_gradient(algorithm, batch, truth)
    algorithm.inner_steps = 0
    truth = plain_loop(algorithm.model, batch, rate_of(algorithm), steps=0)
    torch.testing.assert_close(algorithm(batch).task_loss, truth)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("first_order", [False, True])
def test_multi_step_loss_equals_the_loop_over_tasks(net, first_order):
    build, shape = NETS[net]
    algorithm = unequal(MAMLPlusPlus(build(), inner_steps=3, first_order=first_order, multi_step_iterations=10))
    algorithm.iteration = 4
    batch = class_batch(shape=shape)
    truth = plain_multi_step(algorithm, batch, [0.2, 0.2, 0.6], first_order=first_order)
    assert_same_meta_gradient(algorithm, batch, truth)
    assert algorithm.iteration == 5


def test_weights_of_the_steps_shift_to_the_last():
    algorithm, batch = MAMLPlusPlus(small_mlp(), inner_steps=4, multi_step_iterations=100), class_batch()
    assert algorithm.step_weights() == [0.25] * 4
    algorithm.iteration = 50
    assert algorithm.step_weights() == [0.125, 0.125, 0.125, 0.625]
    algorithm.iteration = 99
    assert algorithm.step_weights() == pytest.approx([0.0075] * 3 + [0.9775])
    algorithm(batch)
    assert algorithm.step_weights() is None
    algorithm.iteration = 0
    assert algorithm.eval().step_weights() is None
    algorithm(batch)
    with torch.no_grad():
        algorithm.train()(batch)
    assert algorithm.iteration == 0


def test_first_order_comes_first():
    algorithm = unequal(MAMLPlusPlus(small_mlp(), inner_steps=2, first_order_iterations=1, multi_step_iterations=0))
    batch = class_batch()
    for first_order in (True, False):
        truth = plain_loop(algorithm.model, batch, rate_of(algorithm), steps=2, first_order=first_order)
        assert_same_meta_gradient(algorithm, batch, truth)


@pytest.mark.parametrize("net", NETS)
def test_protocol(net):
    build, shape = NETS[net]
    algorithm = unequal(MAMLPlusPlus(build(), inner_steps=2)).eval()
    batch = class_batch(shape=shape)
    assert_keeps_the_protocol(algorithm, batch)
    algorithm.inner_steps = 4  # beyond the last, the last one's rates
    rate = rate_of(algorithm)
    truth = plain_loop(algorithm.model, batch, lambda step, name: rate(min(step, 1), name), steps=4)
    torch.testing.assert_close(algorithm(batch).task_loss, truth, rtol=1e-8, atol=1e-8)


def test_chunks_of_tasks_give_the_same_gradient():
    batch = class_batch(tasks=5)
    for iterations in (0, 100):
        both = [MAMLPlusPlus(small_mlp(), multi_step_iterations=iterations, task_chunk=c) for c in (None, 2)]
        for algorithm in both:
            algorithm(batch).loss.backward()
            assert algorithm.iteration == 1
        for a, b in zip(both[0].parameters(), both[1].parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_rates_may_stay_as_they_are():
    algorithm = MAMLPlusPlus(small_mlp(), learned_rates=False)
    algorithm(class_batch()).loss.backward()
    assert [rate.grad for rate in algorithm.rates.values()] == [None] * 3
    assert [p.grad is None for p in algorithm.model.parameters()] == [False] * 6


class Normed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(5, 6), norm, nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.first(x))))


@pytest.mark.parametrize("adapt_norms", [False, True])
def test_batch_norms_have_statistics_and_scales_of_each_step(adapt_norms):
    torch.manual_seed(0)
    algorithm = MAMLPlusPlus(Normed(nn.BatchNorm1d(6)).double(), inner_steps=2, adapt_norms=adapt_norms,
                             multi_step_iterations=0)  # fmt: skip
    unequal(algorithm)
    norm, batch = algorithm.model.norm, class_batch()
    assert isinstance(norm, BatchNormPerStep) and norm.weight.shape == (2, 6)
    assert ("layer/norm" in algorithm.rates) == adapt_norms
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.5, 0.5)
    before = norm.running_mean.clone()
    output = algorithm(batch)
    gradients = torch.autograd.grad(output.loss, list(algorithm.parameters()))

    losses, means = [], []
    for sx, sy, qx, qy in zip(*batch, strict=True):
        names = dict(algorithm.model.named_parameters())
        fast = {n: p for n, p in names.items() if adapt_norms or "norm" not in n}
        mean = before.clone()

        def predict(weights, x, step, mean=mean, names=names):
            w = names | weights
            h = F.linear(x, w["first.weight"], w["first.bias"])
            mean[step] = 0.9 * mean[step] + 0.1 * h.detach().mean(0)
            h = F.batch_norm(h, None, None, w["norm.weight"][step], w["norm.bias"][step], True)
            return F.linear(torch.tanh(h), w["head.weight"], w["head.bias"])

        for step in range(2):
            value = F.cross_entropy(predict(fast, sx, step), sy)
            found = torch.autograd.grad(value, list(fast.values()), create_graph=True)
            rate = rate_of(algorithm)
            fast = {n: w - rate(step, n) * g for (n, w), g in zip(fast.items(), found, strict=True)}
        losses.append(F.cross_entropy(predict(fast, qx, 1), qy))
        means.append(mean)
    truth = torch.stack(losses)
    torch.testing.assert_close(output.task_loss, truth, rtol=1e-8, atol=1e-8)
    expected = torch.autograd.grad(truth.mean(), list(algorithm.parameters()))
    torch.testing.assert_close(gradients, expected, rtol=1e-8, atol=1e-8)
    # step 0: the support rows; step 1: first the support, then the query rows
    after = algorithm.model.norm.running_mean
    torch.testing.assert_close(after[0], torch.stack(means).mean(0)[0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(after[1], torch.stack(means).mean(0)[1], rtol=1e-8, atol=1e-8)


def test_batch_norm_per_step_is_batch_norm():
    torch.manual_seed(0)
    for shape, plain in (((8, 3), nn.BatchNorm1d(3)), ((4, 3, 5, 5), nn.BatchNorm2d(3, affine=False, eps=1e-3))):
        x = torch.randn(shape) * 2 + 1
        ours = BatchNormPerStep.like(plain, 2)
        ours.step = 7
        torch.testing.assert_close(ours(x), plain(x))
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(ours, name)[1], getattr(plain, name))
        assert not ours.running_mean[0].any()
        torch.testing.assert_close(ours.eval()(x), plain.eval()(x))
    untracked = BatchNormPerStep.like(nn.BatchNorm1d(3, track_running_stats=False), 2).eval()
    x = torch.randn(8, 3)
    torch.testing.assert_close(untracked(x), F.batch_norm(x, None, None, training=True))


def test_evaluation_uses_and_keeps_the_running_statistics():
    def net():
        inside = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
        return nn.Sequential(nn.Conv2d(1, 3, 3), inside, nn.Flatten(), nn.Linear(48, 3)).double()

    torch.manual_seed(0)
    model = net()
    algorithm = MAMLPlusPlus(model, inner_steps=2)
    assert isinstance(model[1][0], BatchNormPerStep)
    batch = class_batch(shape=(1, 6, 6))
    for _ in range(3):
        algorithm(batch).loss.backward()
    algorithm.eval()
    before = {name: buffer.clone() for name, buffer in algorithm.named_buffers()}
    assert_keeps_the_protocol(algorithm, batch)
    assert all(torch.equal(before[name], buffer) for name, buffer in algorithm.named_buffers())
    one = algorithm(batch._replace(query_x=batch.query_x[:, :1], query_y=batch.query_y[:, :1]))
    torch.testing.assert_close(one.logits, algorithm(batch).logits[:, :1])  # not transductive
    torch.manual_seed(1)
    other = MAMLPlusPlus(net(), inner_steps=2).eval()
    assert_saves_and_loads(algorithm, other, batch)
    assert other.iteration == 3


def test_saves_and_loads():
    one, other = unequal(MAMLPlusPlus(small_mlp(seed=1))), MAMLPlusPlus(small_mlp())
    one.iteration = 17
    assert_saves_and_loads(one, other, class_batch())
    assert other.iteration == 17
    assert sorted(one.rates) == ["layer/1", "layer/3", "layer/5"] and one.rates["layer/1"].shape == (5,)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="inner_steps must be at least 1"):
        MAMLPlusPlus(mlp([5, 3]), inner_steps=0)
    with pytest.raises(ValueError, match="multi_step_iterations must be at least 0"):
        MAMLPlusPlus(mlp([5, 3]), multi_step_iterations=-1)
    with pytest.raises(TypeError, match="first_order_iterations must be an int"):
        MAMLPlusPlus(mlp([5, 3]), first_order_iterations=0.5)
    with pytest.raises(ValueError, match="inner_lr must be above 0"):
        MAMLPlusPlus(mlp([5, 3]), inner_lr=0)
    with pytest.raises(TypeError, match="inner_lr must be a number"):
        MAMLPlusPlus(mlp([5, 3]), inner_lr=None)
    batch = class_batch()
    for build, shape in NETS.values():
        for iterations in (0, 10):
            with pytest.raises(ValueError, match="support_y: mse"):
                MAMLPlusPlus(build(), loss="mse", multi_step_iterations=iterations)(class_batch(shape=shape))
            wrong = class_batch(shape=shape)._replace(query_y=batch.query_y.int())
            with pytest.raises(ValueError, match="query_y: cross_entropy"):
                MAMLPlusPlus(build(), multi_step_iterations=iterations)(wrong)
    model = nn.Sequential(nn.BatchNorm1d(5))
    assert isinstance(MAMLPlusPlus(model, batch_norm_per_step=False, adapt_norms=True).model[0], nn.BatchNorm1d)


@pytest.mark.learning
def test_learns_rates_where_they_start_too_small():
    """MAML keeps the rate it was given."""
    torch.manual_seed(0)
    ours = MAMLPlusPlus(mlp([1, 40, 40, 1]), inner_lr=0.003, inner_steps=1, loss="mse")
    torch.manual_seed(0)
    maml = MAML(mlp([1, 40, 40, 1]), inner_lr=0.003, inner_steps=1, loss="mse")
    for algorithm in (ours, maml):
        train_on_sinusoids(algorithm, 500, lr=1e-2)
    error = sinusoid_error(ours)
    assert error < 0.8 * sinusoid_error(maml), (error, sinusoid_error(maml))
    assert error < sinusoid_error(ours, 0) / 1.5
