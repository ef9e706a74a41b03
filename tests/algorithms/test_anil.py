"""ANIL and BOIL against a loop over tasks in plain words, where their loops run, and that they learn."""

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
    small_conv,
    small_mlp,
    train_on_sinusoids,
)
from torch import nn

from fastmeta.algorithms import _encoder
from fastmeta.algorithms.anil import ANIL, BOIL
from fastmeta.nn import conv4, mlp

PREDICATES = {
    "head": "head",
    "body": "body",
    "last weights": lambda name: name.endswith("weight") and not name.startswith("0"),
    "biases": lambda name: name.endswith("bias"),
}
HEAD = {"mlp": "5", "conv": "4"}


def as_predicate(adapts, net):
    if callable(adapts):
        return adapts
    return lambda name: name.startswith(HEAD[net]) == (adapts == "head")


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("adapts", PREDICATES)
@pytest.mark.parametrize("first_order", [False, True])
def test_equals_the_loop_over_tasks(net, adapts, first_order):
    build, shape = NETS[net]
    adapts, batch = PREDICATES[adapts], class_batch(shape=shape)
    for steps in (0, 1, 3):
        algorithm = ANIL(build(), adapts=adapts, inner_lr=0.3, inner_steps=steps, first_order=first_order)
        truth = plain_loop(algorithm.model, batch, lambda step, name: 0.3, steps=steps, first_order=first_order,
                           adapts=as_predicate(adapts, net))  # fmt: skip
        assert_same_meta_gradient(algorithm, batch, truth)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("adapts", ["head", "body"])
def test_protocol(net, adapts):
    build, shape = NETS[net]
    algorithm, batch = ANIL(build(), adapts=adapts, inner_lr=0.3), class_batch(shape=shape)
    assert_keeps_the_protocol(algorithm, batch)
    state = algorithm.adapt(batch.support_x, batch.support_y)
    slow = dict(algorithm.model.named_parameters())
    assert state.shared == set(slow) - set(algorithm.adapting)
    assert all(state[0][name] is slow[name] for name in state.shared)


@pytest.mark.parametrize("net", NETS)
def test_first_order_holds_for_adapt_and_predict_too(net):
    """The encoder's gradient comes from the query rows alone, not from the support rows behind the inner gradient."""
    build, shape = NETS[net]
    algorithm, batch = ANIL(build(), inner_lr=0.3, inner_steps=2, first_order=True), class_batch(shape=shape)
    parameters = list(algorithm.parameters())
    logits = algorithm.predict(algorithm.adapt(batch.support_x, batch.support_y), batch.query_x)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.query_y.flatten())
    right = torch.autograd.grad(algorithm(batch).loss, parameters)
    for ours, expected in zip(torch.autograd.grad(loss, parameters), right, strict=True):
        torch.testing.assert_close(ours, expected)


def test_the_encoder_runs_once_per_example():
    calls = []

    class Counted(nn.Flatten):
        def forward(self, x):
            calls.extend([1] * isinstance(x, torch.Tensor))  # not where it is looked at with a symbol
            return super().forward(x)

    model, batch = small_conv(), class_batch(shape=(1, 6, 6))
    place = next(i for i, layer in enumerate(model) if isinstance(layer, nn.Flatten))
    model[place] = Counted()
    algorithm = ANIL(model, inner_steps=7)
    algorithm(batch)  # what torch.func makes of it is tried once
    calls.clear()
    algorithm(batch)
    assert len(calls) == 2  # support and query
    encoder, tail = _encoder.split(model, ["4.weight", "4.bias"])
    assert len(encoder) == 4 and len(tail) == 1
    assert _encoder.split(model, ["4.weight"])[1] is tail
    assert _encoder.split(model, ["0.weight"]) == (None, model)
    model[4] = nn.Linear(12, 4).double()  # a layer that was replaced is seen
    assert ANIL(model)(batch).logits.shape[-1] == 4


def test_modules_that_are_no_chain():
    """The split is by name, wherever the parameters are used."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(x + torch.tanh(self.body(x)))

    torch.manual_seed(0)
    algorithm, batch = BOIL(Residual().double(), inner_steps=2), class_batch()
    assert algorithm.adapting == ["body.weight", "body.bias"]
    truth = plain_loop(algorithm.model, batch, lambda *_: 0.5, steps=2, adapts=lambda n: n.startswith("body"))
    assert_same_meta_gradient(algorithm, batch, truth)


def test_batch_norm_of_the_encoder_sees_one_task():
    torch.manual_seed(0)
    model = nn.Sequential(conv4(hidden=4, track_running_stats=False), nn.Flatten(), nn.Linear(4, 3)).double()
    batch = class_batch(shape=(1, 16, 16))
    ours = ANIL(model, inner_lr=0.3, inner_steps=2)(batch)
    truth = plain_loop(model, batch, lambda *_: 0.3, steps=2, adapts=lambda name: name.startswith("2"))
    torch.testing.assert_close(ours.task_loss, truth, rtol=1e-8, atol=1e-8)


def test_batch_norm_of_the_encoder_with_running_statistics_sees_the_whole_batch():
    torch.manual_seed(0)
    body, head = conv4(hidden=4).double(), nn.Linear(4, 3).double()
    batch = class_batch(shape=(1, 16, 16))
    algorithm = ANIL(nn.Sequential(body, nn.Flatten(), head), inner_lr=0.3, inner_steps=2)
    for mode in (True, False):
        algorithm.train(mode)
        before = [buffer.clone() for buffer in body.buffers()]
        ours = algorithm(batch)
        moved = [not torch.equal(b, now) for b, now in zip(before, body.buffers(), strict=True)]
        assert all(moved) if mode else not any(moved)
        x = torch.cat([batch.support_x, batch.query_x], 1)
        features = body(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        support, query = features.split([batch.support_x.shape[1], batch.query_x.shape[1]], 1)
        truth = ANIL(head, inner_lr=0.3, inner_steps=2)(
            batch._replace(support_x=support.detach(), query_x=query.detach())
        )
        torch.testing.assert_close(ours.task_loss, truth.task_loss)
    torch.testing.assert_close(
        algorithm.predict(algorithm.adapt(batch.support_x, batch.support_y), batch.query_x), ours.logits
    )


def test_frozen_heads_are_left_alone():
    model = small_mlp()
    for p in model[1].parameters():
        p.requires_grad_(False)
    assert ANIL(model, adapts="body").adapting == ["3.weight", "3.bias"]


def test_saves_and_loads():
    assert_saves_and_loads(ANIL(small_mlp(seed=1)), ANIL(small_mlp()), class_batch())
    assert list(BOIL(small_mlp()).state_dict()) == [f"model.{name}" for name in small_mlp().state_dict()]


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="adapts must be one of"):
        ANIL(mlp([5, 3]), adapts="neck")
    with pytest.raises(ValueError, match="adapts picks none of the parameters"):
        ANIL(mlp([5, 4, 3]), adapts=lambda name: False)
    with pytest.raises(ValueError, match="adapts picks none of the parameters"):
        BOIL(mlp([5, 3]))  # one layer: the head
    with pytest.raises(TypeError, match="BOIL adapts the body"):
        BOIL(mlp([5, 4, 3]), adapts="head")
    with pytest.raises(TypeError, match="inner_lr must be a number"):
        ANIL(mlp([5, 3]), inner_lr="fast")
    with pytest.raises(ValueError, match="inner_lr must be"):
        ANIL(mlp([5, 3]), inner_lr=float("nan"))
    batch = class_batch(dtype=torch.float32)
    for model in (mlp([5, 4, 3]), nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))):
        with pytest.raises(ValueError, match="support_y: mse"):
            ANIL(model, loss="mse")(batch)
        with pytest.raises(ValueError, match="query_y: cross_entropy"):
            ANIL(model)(batch._replace(query_y=batch.query_y.int()))
    assert "'head'" in repr(ANIL(mlp([5, 3]))) and "1.bias" in repr(ANIL(mlp([5, 3]), adapts=lambda n: "bias" in n))


@pytest.mark.learning
@pytest.mark.parametrize("algorithm", [ANIL, BOIL])
def test_learns_sinusoids(algorithm):
    torch.manual_seed(0)
    rate = 0.05 if algorithm is ANIL else 0.01
    learner = algorithm(mlp([1, 40, 40, 1], "tanh"), inner_lr=rate, inner_steps=3, loss="mse")
    train_on_sinusoids(learner, 600)
    adapted, before = sinusoid_error(learner), sinusoid_error(learner, 0)
    assert adapted < 1.6 and adapted < before / 2.5, (adapted, before)
    state, head = learner.adapt(torch.randn(2, 10, 1), torch.randn(2, 10, 1)), {"5.weight", "5.bias"}
    assert (state.shared if algorithm is BOIL else state.weights.keys() - state.shared) == head
