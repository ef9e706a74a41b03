"""Matching Networks against the formulas, one query at a time, and that they learn."""

import math

import pytest
import torch
from embedding_cases import check_protocol, class_batch, hidden_signal, judge, train
from torch import nn
from torch.nn import functional as F

from fastmeta.algorithms.matching_networks import MatchingNetwork, class_log_probabilities
from fastmeta.nn import mlp


def network(**options):
    torch.manual_seed(0)
    return MatchingNetwork(mlp([5, 8, 4], "tanh"), **({"ways": 3} | options))


@pytest.mark.parametrize("learn_scale", [True, False])
def test_protocol(learn_scale):
    check_protocol(network(learn_scale=learn_scale), class_batch())


def test_protocol_with_full_context():
    # the LSTM reads the support set in order
    check_protocol(network(full_context=True, features=4), class_batch(), shuffles=False)


def test_is_the_formula():
    net, batch = network(scale=3.0), class_batch()
    logits = net(batch).logits
    for task in range(4):
        support, query = net.encoder(batch.support_x[task]), net.encoder(batch.query_x[task])
        for row in range(len(query)):
            weights = torch.softmax(3 * F.cosine_similarity(query[row : row + 1], support), 0)
            expected = [weights[batch.support_y[task] == n].sum().log() for n in range(3)]
            torch.testing.assert_close(logits[task, row], torch.stack(expected), rtol=1e-4, atol=1e-5)
    loss = F.nll_loss(logits.flatten(0, 1), batch.query_y.flatten())
    torch.testing.assert_close(net(batch).loss, loss)


def test_full_context_is_the_formula():
    net, batch = network(full_context=True, features=4, steps=3), class_batch()
    logits = net(batch).logits
    recurrent = net.query_lstm
    for task in range(4):
        plain = net.encoder(batch.support_x[task])
        both = net.support_lstm(plain.unsqueeze(0))[0][0]
        support = plain + both[:, :4] + both[:, 4:]
        for row, f in enumerate(net.encoder(batch.query_x[task])):
            h = c = torch.zeros(4)
            for _ in range(3):
                r = torch.softmax(support @ h, 0) @ support
                gates = recurrent.weight_ih[:, :4] @ f + recurrent.weight_ih[:, 4:] @ r + recurrent.weight_hh @ h
                i, forget, g, o = (gates + recurrent.bias_ih + recurrent.bias_hh).chunk(4)
                c = forget.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh() + f
            weights = torch.softmax(10 * F.cosine_similarity(h.unsqueeze(0), support), 0)
            expected = [weights[batch.support_y[task] == n].sum().log() for n in range(3)]
            torch.testing.assert_close(logits[task, row], torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_other_ways_and_shots_at_test():
    net = network(ways=None)
    assert net(class_batch(ways=3)).logits.shape == (4, 9, 3)
    assert net(class_batch(ways=6, shots=1)).logits.shape == (4, 18, 6)
    net.ways = 4
    logits = net(class_batch(ways=3)).logits
    assert (logits[..., 3] == -math.inf).all()  # nobody in the support set votes for it


def test_log_probabilities_of_large_scores_and_absent_classes():
    scores = torch.tensor([[[0.0, -300.0, -310.0, -310.0]]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 2, 3, 3]])
    logits = class_log_probabilities(scores, labels, 5)
    expected = [0, -math.inf, -300, math.log(2) - 310, -math.inf]
    torch.testing.assert_close(logits[0, 0], torch.tensor(expected, dtype=torch.float64))
    logits[0, 0, 3].backward()
    torch.testing.assert_close(scores.grad[0, 0], torch.tensor([-1, 0, 0.5, 0.5], dtype=torch.float64))


def test_arguments_are_checked():
    batch = class_batch()
    with pytest.raises(ValueError, match="ways"):
        network(ways=0)
    with pytest.raises(ValueError, match="scale"):
        network(scale=0)
    with pytest.raises(ValueError, match="steps"):
        network(steps=0)
    with pytest.raises(ValueError, match="features"):
        network(full_context=True)
    with pytest.raises(ValueError, match="encoder"):
        MatchingNetwork(nn.Unflatten(1, (5, 1)))(batch)
    with pytest.raises(ValueError, match="support_y.*2"):
        network(ways=2)(batch)
    with pytest.raises(ValueError, match="query_y.*7"):
        network()(batch._replace(query_y=batch.query_y.clone().fill_(7)))
    with pytest.raises(TypeError, match="int64"):
        network()(batch._replace(support_y=batch.support_y.int()))
    with pytest.raises(ValueError, match="tasks"):
        net = network()
        net.predict(net.adapt(batch.support_x, batch.support_y), batch.query_x[:2])


@pytest.mark.learning
@pytest.mark.parametrize("full_context", [False, True])
def test_learns_which_directions_matter(full_context):
    torch.manual_seed(0)
    net = MatchingNetwork(mlp([20, 32, 8]), ways=5, full_context=full_context, features=8)
    before = judge(net, hidden_signal)
    train(net, hidden_signal, 200)
    after = judge(net, hidden_signal)
    assert before < 0.4 and after > 0.85, (before, after)
