"""Modulation by a metric space of the classes, against a loop over tasks and rows, and that it learns."""

import pytest
import torch
from embedding_cases import check_protocol, class_batch, hidden_signal, judge, train
from torch import nn
from torch.nn import functional as F

from fastmeta.algorithms import FiLM, FiLMConv4, FiLMMLP, ModulatedProtoNet
from fastmeta.nn import conv4, mlp
from fastmeta.tasks import TaskBatch


def network(**options):
    torch.manual_seed(0)
    return ModulatedProtoNet(mlp([5, 8, 4], "tanh"), FiLMMLP(8, [5, 10, 10, 6]), **({"ways": 3} | options))


@pytest.mark.parametrize("metric_weight", [0.0, 0.5])
def test_protocol(metric_weight):
    check_protocol(network(metric_weight=metric_weight), class_batch())


def test_protocol_on_images():
    torch.manual_seed(0)
    net = ModulatedProtoNet(conv4(hidden=4), FiLMConv4(8, hidden=6), ways=3)
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(3).repeat(2).expand(2, 6)
    batch = TaskBatch(torch.randn(2, 6, 1, 16, 16, generator=generator), y, torch.randn(2, 6, 1, 16, 16), y)
    for _ in range(3):
        net(batch)  # running statistics
    net.eval()  # in train mode a batch norm mixes tasks
    check_protocol(net, batch)


def test_is_the_formula():
    net, batch = network(), class_batch()
    output = net(batch)

    def modulated(x, means):
        embedding = net.encoder(x.unsqueeze(0))[0]
        weights = torch.softmax(-(embedding - means).square().sum(1), 0)
        condition = torch.cat([embedding, weights @ means])
        for layer, film in zip(net.base.layers[:-1], net.base.films, strict=True):
            gamma, beta = film.code(condition).chunk(2)
            x = ((1 + gamma) * layer(x) + beta).relu()
        return embedding, net.base.layers[-1](x)

    for task in range(4):
        support, labels = batch.support_x[task], batch.support_y[task]
        means = torch.stack([net.encoder(support[labels == n]).mean(0) for n in range(3)])
        features = torch.stack([modulated(x, means)[1] for x in support])
        prototypes = torch.stack([features[labels == n].mean(0) for n in range(3)])
        rows = [modulated(x, means) for x in batch.query_x[task]]
        logits = torch.stack([-(row - prototypes).square().sum(1) for _, row in rows])
        metric = torch.stack([-(row - means).square().sum(1) for row, _ in rows])
        torch.testing.assert_close(output.logits[task], logits, rtol=1e-4, atol=1e-5)
        loss = F.cross_entropy(logits, batch.query_y[task])
        both = loss + 0.5 * F.cross_entropy(metric, batch.query_y[task])
        torch.testing.assert_close(output.task_loss[task], both)
        torch.testing.assert_close(net.eval()(batch).task_loss[task], loss)
        net.train()


def test_film():
    torch.manual_seed(0)
    film, x, condition = FiLM(3, 2), torch.randn(4, 2, 5, 5), torch.randn(4, 3)
    gamma, beta = film.code(condition)[:, :2], film.code(condition)[:, 2:]
    torch.testing.assert_close(film(x, condition)[1, 0], (1 + gamma[1, 0]) * x[1, 0] + beta[1, 0])
    with torch.no_grad():
        film.code[2].weight.zero_()
        film.code[2].bias.zero_()
    assert torch.equal(film(x, condition), x)


def test_one_example_more_changes_what_a_query_looks_like():
    """The modulation depends on the support set: with other classes around it, a query has other features."""
    net, batch = network(), class_batch()
    means = net.adapt(batch.support_x, batch.support_y).metric
    embeddings = net._encode(batch.query_x)
    here = net._modulated(batch.query_x, net._condition(embeddings, means))
    elsewhere = net._modulated(batch.query_x, net._condition(embeddings, means.roll(1, 0)))
    assert (here - elsewhere).abs().max() > 1e-4


def test_other_ways_and_shots_at_test():
    net = network(ways=None)
    assert net(class_batch(ways=3)).logits.shape == (4, 9, 3)
    assert net(class_batch(ways=6, shots=4)).logits.shape == (4, 18, 6)


def test_arguments_are_checked():
    batch = class_batch()
    with pytest.raises(ValueError, match="metric must"):
        network(metric="near")
    with pytest.raises(ValueError, match="metric_weight"):
        network(metric_weight=-1.0)
    with pytest.raises(ValueError, match="sizes"):
        FiLMMLP(4, [3, 2])
    with pytest.raises(ValueError, match="encoder"):
        ModulatedProtoNet(nn.Unflatten(1, (5, 1)), FiLMMLP(8, [5, 10, 6]))(batch)
    with pytest.raises(ValueError, match="base"):
        net = network()
        net.base.layers[-1] = nn.Sequential(nn.Linear(10, 6), nn.Unflatten(1, (6, 1)))
        net(batch)
    with pytest.raises(ValueError, match="support_y.*ways = 2"):
        network(ways=2)(batch)
    with pytest.raises(ValueError, match="query_y.*7"):
        network()(batch._replace(query_y=batch.query_y.clone().fill_(7)))
    with pytest.raises(ValueError, match="tasks"):
        net = network()
        net.predict(net.adapt(batch.support_x, batch.support_y), batch.query_x[:2])


@pytest.mark.learning
def test_learns_which_directions_matter():
    torch.manual_seed(0)
    net = ModulatedProtoNet(mlp([20, 32, 8]), FiLMMLP(16, [20, 32, 8]), ways=5)
    before = judge(net, hidden_signal)
    train(net, hidden_signal, 200)
    after = judge(net, hidden_signal)
    assert before < 0.4 and after > 0.85, (before, after)


def split_signal(seed, tasks=16, shots=5, queries=5, ways=5):
    """In some tasks the first four columns tell the classes apart and the others are noise, in the rest the last four:
    a row alone does not say which, the classes near it do."""
    generator = torch.Generator().manual_seed(seed)
    shape = (tasks, ways, shots + queries, 4)
    signal = torch.randn(tasks, ways, 1, 4, generator=generator) + 0.1 * torch.randn(shape, generator=generator)
    noise = 1.5 * torch.randn(shape, generator=generator)
    first = torch.rand(tasks, 1, 1, 1, generator=generator) < 0.5
    x = torch.cat([torch.where(first, signal, noise), torch.where(first, noise, signal)], -1)

    def labels(count):
        return torch.arange(ways).repeat_interleave(count).expand(tasks, -1).contiguous()

    return TaskBatch(x[:, :, :shots].flatten(1, 2), labels(shots), x[:, :, shots:].flatten(1, 2), labels(queries))


@pytest.mark.learning
def test_learns_from_the_classes_which_columns_matter():
    """Without the condition it ends below 0.8, with rows alone in the condition below 0.94."""
    torch.manual_seed(0)
    net = ModulatedProtoNet(mlp([8, 16]), FiLMMLP(32, [8, 32, 16]), ways=5)
    train(net, split_signal, 200)
    assert judge(net, split_signal) > 0.96
