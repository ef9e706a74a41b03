"""Relation Networks against the formulas, one pair at a time, and that they learn."""

import pytest
import torch
from embedding_cases import check_protocol, class_batch, hidden_signal, judge, train
from torch import nn
from torch.nn import functional as F

from fastmeta.algorithms.relation_network import RelationConv, RelationMLP, RelationNetwork, relation_encoder
from fastmeta.nn import mlp
from fastmeta.tasks import TaskBatch


def network(**options):
    torch.manual_seed(0)
    return RelationNetwork(mlp([5, 8, 4], "tanh"), RelationMLP(4, 16), **({"ways": 3} | options))


def images(tasks=2, ways=3, shots=2, queries=2, size=28):
    generator = torch.Generator().manual_seed(0)

    def rows(count):
        x = torch.randn(tasks, ways * count, 1, size, size, generator=generator)
        return x, torch.arange(ways).repeat_interleave(count).expand(tasks, -1)

    return TaskBatch(*rows(shots), *rows(queries))


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("pool", ["sum", "mean"])
def test_protocol(loss, pool):
    # one number added to every class's logit changes no cross-entropy
    inert = ("relation.score.bias",) if loss == "cross_entropy" else ()
    check_protocol(network(loss=loss, pool=pool), class_batch(), inert=inert)


def test_protocol_with_feature_maps():
    torch.manual_seed(0)
    net = RelationNetwork(relation_encoder(hidden=4), RelationConv(4, 6), ways=3)
    for _ in range(3):
        net(images())  # running statistics
    net.eval()  # in train mode a batch norm mixes tasks
    check_protocol(net, images())


@pytest.mark.parametrize("pool", ["sum", "mean"])
def test_is_the_formula(pool):
    net, batch = network(pool=pool), class_batch()
    relation = net.relation
    first = torch.cat([relation.of_class.weight, relation.of_query.weight], 1)
    output = net(batch)
    for task in range(4):
        support, query = net.encoder(batch.support_x[task]), net.encoder(batch.query_x[task])
        error = 0.0
        for row in range(len(query)):
            for n in range(3):
                members = support[batch.support_y[task] == n]
                pair = torch.cat([members.sum(0) if pool == "sum" else members.mean(0), query[row]])
                score = relation.score((first @ pair + relation.of_class.bias).relu())
                torch.testing.assert_close(output.logits[task, row, n], score[0], rtol=1e-4, atol=1e-5)
                error = error + (score.sigmoid() - (batch.query_y[task, row] == n).float()) ** 2 / (9 * 3)
        torch.testing.assert_close(output.task_loss[task], error[0])
    entropy = F.cross_entropy(output.logits.flatten(0, 1), batch.query_y.flatten())
    torch.testing.assert_close(network(pool=pool, loss="cross_entropy")(batch).loss, entropy)


def test_convolution_of_a_pair_is_that_of_its_channels_together():
    torch.manual_seed(0)
    relation = RelationConv(3, 4, size=8).eval()
    classes, query = torch.randn(2, 3, 3, 8, 8), torch.randn(2, 5, 3, 8, 8)
    whole = nn.Conv2d(6, 4, 3, padding=1)
    whole.weight = nn.Parameter(torch.cat([relation.of_class.weight, relation.of_query.weight], 1))
    whole.bias = relation.of_class.bias
    scores = relation(classes, query)
    for task, row, n in [(0, 0, 0), (1, 4, 2), (0, 3, 1)]:
        pair = torch.cat([classes[task, n], query[task, row]]).unsqueeze(0)
        torch.testing.assert_close(scores[task, row, n], relation.rest(whole(pair))[0, 0], rtol=1e-4, atol=1e-5)


def test_other_ways_and_shots_at_test():
    net = network(ways=None, pool="mean")
    assert net(class_batch(ways=3)).logits.shape == (4, 9, 3)
    assert net(class_batch(ways=6, shots=4)).logits.shape == (4, 18, 6)


def test_arguments_are_checked():
    batch = class_batch()
    with pytest.raises(ValueError, match="pool"):
        network(pool="max")
    with pytest.raises(ValueError, match="loss"):
        network(loss="hinge")
    with pytest.raises(ValueError, match="size"):
        RelationConv(size=3)
    with pytest.raises(ValueError, match="maps"):
        RelationNetwork(mlp([5, 4]), RelationConv(4))(batch)
    with pytest.raises(ValueError, match="scores"):
        RelationNetwork(mlp([5, 4]), nn.Bilinear(4, 4, 1))(class_batch(ways=9, queries=1, shots=1))
    with pytest.raises(ValueError, match="encoder"):
        RelationNetwork(nn.Unflatten(1, (5, 1)), RelationMLP(5))(batch)
    with pytest.raises(ValueError, match="support_y.*ways = 2"):
        network(ways=2)(batch)
    with pytest.raises(ValueError, match="query_y.*7"):
        network()(batch._replace(query_y=batch.query_y.clone().fill_(7)))


@pytest.mark.learning
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_learns_to_compare(loss):
    torch.manual_seed(0)
    net = RelationNetwork(mlp([20, 32, 8]), RelationMLP(8, 64), ways=5, loss=loss)

    def sample(seed):
        return hidden_signal(seed, strength=0.5)

    before = judge(net, sample)
    train(net, sample, 400)
    after = judge(net, sample)
    assert before < 0.4 and after > 0.9, (before, after)
