"""Meta-SGD against a loop over tasks in plain words, and that its learned rates help."""

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
    value_batch,
)

from fastmeta.algorithms.maml import MAML
from fastmeta.algorithms.meta_sgd import MetaSGD
from fastmeta.nn import mlp


def rate_of(algorithm):
    return lambda step, name: algorithm.rates[name.replace(".", "/")]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("first_order", [False, True])
def test_equals_the_loop_over_tasks(net, steps, first_order):
    build, shape = NETS[net]
    algorithm = MetaSGD(build(), inner_steps=steps, first_order=first_order, initial_rates=(-0.2, 0.3))
    batch = class_batch(shape=shape)
    truth = plain_loop(algorithm.model, batch, rate_of(algorithm), steps=steps, first_order=first_order)
    assert_same_meta_gradient(algorithm, batch, truth)


@pytest.mark.parametrize("custom", [False, True])
def test_regression_and_a_loss_of_ones_own(custom):
    loss = torch.nn.functional.mse_loss
    algorithm = MetaSGD(small_mlp((5, 8, 2)), inner_steps=2, loss=(lambda p, t: loss(p, t)) if custom else "mse")
    batch = value_batch()
    truth = plain_loop(algorithm.model, batch, rate_of(algorithm), steps=2, loss="mse")
    assert_same_meta_gradient(algorithm, batch, truth)


@pytest.mark.parametrize("net", NETS)
def test_protocol(net):
    build, shape = NETS[net]
    algorithm = MetaSGD(build(), inner_steps=2, initial_rates=(0.1, 0.3))
    assert_keeps_the_protocol(algorithm, class_batch(shape=shape))


def test_frozen_parameters_stay_and_their_rates_rest():
    model, batch = small_mlp(), class_batch()
    for p in model[1].parameters():
        p.requires_grad_(False)
    algorithm = MetaSGD(model, inner_steps=2)
    assert sorted(algorithm.rates) == [f"{i}/{kind}" for i in (1, 3, 5) for kind in ("bias", "weight")]
    state = algorithm.adapt(batch.support_x, batch.support_y)
    assert state.shared == {"1.weight", "1.bias"}
    truth = plain_loop(model, batch, rate_of(algorithm), steps=2, adapts=lambda name: not name.startswith("1."))
    assert_same_meta_gradient(algorithm, batch, truth)


def test_chunks_of_tasks_give_the_same_gradient():
    batch = class_batch(tasks=5)
    whole, parts = MetaSGD(small_mlp()), MetaSGD(small_mlp(), task_chunk=2)
    parts.load_state_dict(whole.state_dict())
    whole(batch).loss.backward()
    parts(batch).loss.backward()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_rates_start_uniform_and_are_saved():
    algorithm = MetaSGD(mlp([50, 50, 3]))
    rates = torch.cat([rate.flatten() for rate in algorithm.rates.values()])
    assert 0.005 <= rates.min() < 0.006 and 0.099 < rates.max() <= 0.1 and abs(rates.mean() - 0.0525) < 0.005
    assert_saves_and_loads(MetaSGD(small_mlp(seed=1)), MetaSGD(small_mlp()), class_batch())


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="inner_steps must be at least 0, got -1"):
        MetaSGD(mlp([5, 3]), inner_steps=-1)
    with pytest.raises(TypeError, match="inner_steps must be an int"):
        MetaSGD(mlp([5, 3]), inner_steps=1.0)
    with pytest.raises(ValueError, match="initial_rates must be a range"):
        MetaSGD(mlp([5, 3]), initial_rates=(0.2, 0.1))
    with pytest.raises(TypeError, match="initial_rates must be a pair"):
        MetaSGD(mlp([5, 3]), initial_rates=0.1)
    with pytest.raises(ValueError, match="task_chunk"):
        MetaSGD(mlp([5, 3]), task_chunk=0)
    with pytest.raises(ValueError, match="loss must be"):
        MetaSGD(mlp([5, 3]), loss="hinge")
    algorithm, batch = MetaSGD(small_mlp()), class_batch()
    with pytest.raises(ValueError, match="support_x and support_y"):
        algorithm(batch._replace(support_y=batch.support_y[:, 1:]))
    with pytest.raises(ValueError, match="query_y: cross_entropy"):
        algorithm(batch._replace(query_y=batch.query_y.int()))
    with pytest.raises(ValueError, match="tasks"):
        algorithm.predict(algorithm.adapt(batch.support_x, batch.support_y), batch.query_x[:2])


@pytest.mark.learning
def test_learned_rates_beat_a_fixed_one():
    torch.manual_seed(0)
    learned = MetaSGD(mlp([1, 40, 40, 1]), loss="mse")
    torch.manual_seed(0)
    fixed = MAML(mlp([1, 40, 40, 1]), inner_lr=0.05, loss="mse")
    before = [rate.detach().clone() for rate in learned.rates.values()]
    for algorithm in (learned, fixed):
        train_on_sinusoids(algorithm, 1000, lr=3e-3)
    error = sinusoid_error(learned)
    assert error < 0.85 * sinusoid_error(fixed), (error, sinusoid_error(fixed))
    assert error < sinusoid_error(learned, 0) / 4
    assert any((rate < 0).any() for rate in learned.rates.values())  # directions, too
    moved = [rate.detach() - start for rate, start in zip(learned.rates.values(), before, strict=True)]
    assert all(m.std(correction=0) > 0.03 or m.numel() == 1 for m in moved)  # every element on its own
