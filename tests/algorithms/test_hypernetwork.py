"""Hypernetworks against plain loops over tasks, and that the generated weights are worth something."""

import pytest
import torch
from embedding_cases import check_protocol, class_batch, hidden_signal, judge, sinusoids, train
from torch import nn

from fastmeta.algorithms.hypernetwork import Hypernetwork
from fastmeta.nn import mlp

MODES = ["full", "head", "lowrank"]


def classifier(**options):
    torch.manual_seed(0)
    options = {"ways": 3, "hidden": (6,), "set_width": 16, "rank": 2} | options
    return Hypernetwork(mlp([5, 8, 4], "tanh"), 4, **options)


def regressor(**options):
    torch.manual_seed(0)
    options = {"outputs": 1, "hidden": (6, 7), "set_width": 16, "rank": 2} | options
    return Hypernetwork(nn.Flatten(), 1, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hidden", [(), (6,), (6, 7)])
def test_protocol(mode, hidden):
    check_protocol(classifier(mode=mode, hidden=hidden), class_batch())


@pytest.mark.parametrize("mode", MODES)
def test_protocol_of_regression(mode):
    check_protocol(regressor(mode=mode, ways=9), sinusoids(0, tasks=4))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_is_the_loop_over_tasks(kind, mode):
    if kind == "classification":
        net, batch = classifier(mode=mode, hidden=(6, 7)), class_batch(shots=3)
    else:
        net, batch = regressor(mode=mode), sinusoids(0, tasks=4)
    logits = net(batch).logits
    for task in range(4):
        x, y = net.encoder(batch.support_x[task]), batch.support_y[task]
        if kind == "classification":
            classes = torch.stack([net.of_example(x)[y == n].mean(0) for n in range(3)])
            summary = net.of_class(classes).mean(0)
            head = torch.stack([net.head(torch.cat([row, summary])) for row in classes])
        else:
            summary = net.of_example(torch.cat([x, y], 1)).mean(0)
            head = net.head(summary).view(1, -1)
        h = net.encoder(batch.query_x[task])
        for i, layer in enumerate(net.shared):
            weight, bias = layer.weight, layer.bias
            rows, columns = weight.shape
            if mode == "full":
                code = net.layers[i](summary)
                weight, bias = weight + code[: rows * columns].view(rows, columns), bias + code[rows * columns :]
            if mode == "lowrank":
                code = net.layers[i](summary)
                left, right = code[: 2 * rows].view(rows, 2), code[2 * rows : -rows].view(2, columns)
                weight, bias = weight + left @ right, bias + code[-rows:]
            h = (h @ weight.T + bias).relu()
        torch.testing.assert_close(logits[task], h @ head[:, :-1].T + head[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_numbering_of_the_classes_does_not_matter(mode):
    net, batch = classifier(mode=mode), class_batch()
    order = torch.tensor([2, 0, 1])  # class n is now called order[n]
    renamed = batch._replace(support_y=order[batch.support_y], query_y=order[batch.query_y])
    before, after = net(batch), net(renamed)
    torch.testing.assert_close(after.logits[..., order], before.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.task_loss, before.task_loss, rtol=1e-4, atol=1e-5)


def test_every_task_has_its_own_weights():
    net, batch = classifier(mode="full"), class_batch()
    state = net.adapt(batch.support_x, batch.support_y)
    assert [w.shape for w in state.weights] == [(4, 6, 4), (4, 3, 6)]
    assert all((w[0] - w[1]).abs().max() > 0 for w in state.weights)
    state = classifier(mode="head").adapt(batch.support_x, batch.support_y)
    assert [w.shape for w in state.weights] == [(6, 4), (4, 3, 6)]


def test_other_ways_and_shots_at_test():
    net = classifier(ways=None)
    assert net(class_batch(ways=3)).logits.shape == (4, 9, 3)
    assert net(class_batch(ways=6, shots=4)).logits.shape == (4, 18, 6)


def test_arguments_are_checked():
    batch, numbers = class_batch(), sinusoids(0, tasks=2)
    with pytest.raises(ValueError, match="mode"):
        classifier(mode="tail")
    with pytest.raises(ValueError, match="activation"):
        classifier(activation="swish")
    with pytest.raises(ValueError, match="hidden"):
        classifier(hidden=(6, 0))
    with pytest.raises(ValueError, match="rank"):
        classifier(rank=0)
    with pytest.raises(ValueError, match="encoder"):
        Hypernetwork(mlp([5, 3]), 4)(batch)
    with pytest.raises(ValueError, match="support_y.*ways = 2"):
        classifier(ways=2)(batch)
    with pytest.raises(ValueError, match="query_y.*7"):
        classifier()(batch._replace(query_y=batch.query_y.clone().fill_(7)))
    with pytest.raises(TypeError, match="support_y"):
        regressor()(numbers._replace(support_y=torch.zeros(2, 10, dtype=torch.int64)))
    with pytest.raises(ValueError, match="support_y.*width"):
        regressor(outputs=2)(numbers)
    with pytest.raises(ValueError, match="tasks"):
        net = classifier()
        net.predict(net.adapt(batch.support_x, batch.support_y), batch.query_x[:2])


@pytest.mark.learning
@pytest.mark.parametrize("mode", MODES)
def test_learns_which_directions_matter(mode):
    torch.manual_seed(0)
    net = Hypernetwork(mlp([20, 32, 8]), 8, mode=mode, hidden=(16,), set_width=32, ways=5)

    def sample(seed):
        return hidden_signal(seed, strength=0.5)

    before = judge(net, sample)
    train(net, sample, 300, lr=5e-3)
    after = judge(net, sample)
    assert before < 0.35 and after > 0.72, (before, after)


@pytest.mark.learning
@pytest.mark.parametrize("mode", MODES)
def test_learns_sinusoids(mode):
    torch.manual_seed(0)
    net = Hypernetwork(nn.Flatten(), 1, outputs=1, mode=mode, hidden=(40, 40), activation="tanh", set_width=64)
    before = judge(net, sinusoids)
    train(net, sinusoids, 400, lr=5e-3)
    after = judge(net, sinusoids)
    assert before > 2 and after < 0.8, (before, after)
