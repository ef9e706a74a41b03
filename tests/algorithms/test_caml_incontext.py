"""In-context prediction against one sequence at a time, the label code, and that it learns to read a context."""

import pytest
import torch
from embedding_cases import check_protocol, class_batch, hidden_signal, judge, train
from torch.nn import functional as F

from fastmeta.algorithms.caml_incontext import InContextCAML, elmes
from fastmeta.nn import mlp


def network(**options):
    torch.manual_seed(0)
    options = {"ways": 3, "code_width": 12, "heads": 4, "feedforward": 16} | options
    return InContextCAML(mlp([5, 8, 4], "tanh"), 4, **options)


@pytest.mark.parametrize("options", [{"max_ways": 3}, {"max_ways": 5}, {"query_in_context": False}], ids=str)
def test_protocol(options):
    check_protocol(network(**options), class_batch())


@pytest.mark.parametrize("classes, width", [(2, 2), (5, 5), (5, 64), (20, 64)])
def test_label_code_is_equiangular(classes, width):
    code = elmes(classes, width).double()
    products = code @ code.T
    expected = torch.full((classes, classes), -1 / (classes - 1), dtype=torch.float64)
    torch.testing.assert_close(products, expected.fill_diagonal_(1), rtol=0, atol=1e-6)
    assert torch.equal(elmes(classes, width), elmes(classes, width))


def test_label_code_is_frozen_and_saved():
    net = network()
    assert "code" in net.state_dict() and "code" not in dict(net.named_parameters())
    assert elmes(1, 4).shape == (1, 4)


def test_is_one_sequence_per_query():
    net, batch = network(max_ways=5), class_batch()
    logits = net(batch).logits
    for task in range(4):
        embedded = F.layer_norm(net.encoder(batch.support_x[task]), (4,), net.norm.weight, net.norm.bias)
        context = torch.cat([embedded, net.code_scale * net.code[batch.support_y[task]]], 1)
        for row, x in enumerate(batch.query_x[task]):
            f = F.layer_norm(net.encoder(x.unsqueeze(0)), (4,), net.norm.weight, net.norm.bias)
            tokens = torch.cat([torch.cat([f, net.unknown.unsqueeze(0)], 1), context]).unsqueeze(0)
            for block in net.transformer[:-1]:
                h = block.norm1(tokens)
                heads = block.self_attn.in_proj_weight @ h[0].T + block.self_attn.in_proj_bias.unsqueeze(1)
                q, k, v = heads.view(3, 4, 4, -1).transpose(2, 3)
                mixed = (torch.softmax(q @ k.transpose(1, 2) / 2, -1) @ v).transpose(0, 1).flatten(1)
                tokens = tokens + block.self_attn.out_proj(mixed)
                tokens = tokens + block.linear2(F.gelu(block.linear1(block.norm2(tokens))))
            expected = net.head(net.transformer[-1](tokens)[0, 0])[:3]
            torch.testing.assert_close(logits[task, row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_support_set_encoded_once_is_one_masked_from_the_query(layers):
    net, batch = network(query_in_context=False, max_ways=5, layers=layers).double(), class_batch(dtype=torch.float64)
    with torch.no_grad():  # the layers begin with zeros and ones, which hide what is left out
        for parameter in net.transformer.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    output = net(batch)
    hidden = torch.zeros(7, 7, dtype=torch.bool)
    hidden[:6, 6] = True  # support rows do not see the query, the last
    unknown = net.unknown.expand(1, -1)
    logits = torch.empty_like(output.logits)
    for task in range(4):
        codes = net.code_scale * net.code[batch.support_y[task]]
        support = torch.cat([net.norm(net.encoder(batch.support_x[task])), codes], 1)
        for row, x in enumerate(batch.query_x[task]):
            query = torch.cat([net.norm(net.encoder(x.unsqueeze(0))), unknown], 1)
            tokens = torch.cat([support, query]).unsqueeze(0)
            for block in net.transformer[:-1]:
                tokens = block(tokens, src_mask=hidden)
            logits[task, row] = net.head(net.transformer[-1](tokens)[0, -1])[:3]
    torch.testing.assert_close(output.logits, logits, rtol=1e-11, atol=1e-12)
    expected = F.cross_entropy(logits.flatten(0, 1), batch.query_y.flatten())
    parameters = list(net.parameters())
    found = torch.autograd.grad(output.loss, parameters)
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_predict_does_not_encode_the_support_set_again():
    net, batch = network(query_in_context=False), class_batch()
    state = net.adapt(batch.support_x, batch.support_y)
    read = []
    net.transformer[0].norm1.register_forward_hook(lambda _, inputs, __: read.append(tuple(inputs[0].shape)))
    net.predict(state, batch.query_x)
    assert read == [(4, 9, 16)]


@pytest.mark.parametrize("query_in_context", [True, False])
def test_queries_do_not_see_each_other(query_in_context):
    net, batch = network(query_in_context=query_in_context), class_batch()
    state = net.adapt(batch.support_x, batch.support_y)
    alone = torch.cat([net.predict(state, batch.query_x[:, i : i + 1]) for i in range(9)], 1)
    torch.testing.assert_close(alone, net.predict(state, batch.query_x), rtol=1e-4, atol=1e-5)


def test_predicts_the_same_without_gradients_and_in_eval_mode():
    # torch takes another path through the transformer then
    net, batch = network(), class_batch()
    expected = net(batch).logits.detach()
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(net(batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_fewer_ways_and_other_shots_at_test():
    net = network(ways=None, max_ways=6)
    assert net(class_batch(ways=3)).logits.shape == (4, 9, 3)
    assert net(class_batch(ways=6, shots=4)).logits.shape == (4, 18, 6)
    with pytest.raises(ValueError, match="ways.*max_ways = 6, got 7"):
        net(class_batch(ways=7))


def test_arguments_are_checked():
    batch = class_batch()
    with pytest.raises(ValueError, match="code_width"):
        network(code_width=4)
    with pytest.raises(ValueError, match="heads"):
        network(heads=3)
    with pytest.raises(ValueError, match="classes"):
        elmes(5, 4)
    with pytest.raises(ValueError, match="encoder"):
        InContextCAML(mlp([5, 3]), 4, code_width=12)(batch)
    with pytest.raises(ValueError, match="support_y.*ways = 2"):
        network(ways=2)(batch)
    with pytest.raises(ValueError, match="query_y.*7"):
        network()(batch._replace(query_y=batch.query_y.clone().fill_(7)))
    with pytest.raises(ValueError, match="tasks"):
        net = network()
        net.predict(net.adapt(batch.support_x, batch.support_y), batch.query_x[:2])


@pytest.mark.learning
def test_learns_to_read_its_context():
    """The labels say nothing but what the context gives them: every task numbers its classes anew."""
    torch.manual_seed(0)
    net = InContextCAML(mlp([20, 16]), 16, max_ways=3, code_width=16, layers=2, heads=4, feedforward=32, ways=3)

    def sample(seed):
        return hidden_signal(seed, tasks=32, ways=3, queries=2, strength=0.1)

    before = judge(net, sample)
    train(net, sample, 200, lr=5e-3)
    after = judge(net, sample)
    assert before < 0.45 and after > 0.85, (before, after)
