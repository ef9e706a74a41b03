"""CAML of 2019 against a loop over tasks in plain words, what adapts in it, and that it learns."""

import pytest
import torch
from embedding_cases import hidden_signal, judge, train
from inner_loop_checks import (
    LOSSES,
    assert_keeps_the_protocol,
    assert_same_meta_gradient,
    assert_saves_and_loads,
    class_batch,
    small_mlp,
    value_batch,
)
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from fastmeta.algorithms import ConditionalCAML, FiLMConv4, FiLMMLP
from fastmeta.nn import conv4, mlp


class Own(nn.Module):
    """A base network of one's own, of tokens: an embedding, a condition that is added, a layer norm."""

    def __init__(self):
        super().__init__()
        self.embedding, self.shift = nn.Embedding(7, 6), nn.Linear(4, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x, condition):
        return self.head(torch.tanh(self.norm(self.embedding(x).mean(1) + self.shift(condition))))


CONV = {"hidden": 3, "outputs": 3, "image_size": 16, "track_running_stats": False}
NETS = {
    "mlp": (lambda: mlp([5, 6, 4], "tanh"), lambda: FiLMMLP(4, [5, 8, 6, 3]), None),
    "conv": (lambda: nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
             lambda: FiLMConv4(4, **CONV), None),
    "own": (lambda: nn.EmbeddingBag(7, 4), Own, lambda name: not name.startswith("shift")),
}  # fmt: skip


def build(net, seed=0, **options):
    torch.manual_seed(seed)
    encoder, model, adapts = NETS[net]
    return ConditionalCAML(encoder().double(), model().double(), adapts=adapts, **options)


def batch_for(net, tasks=3):
    if net != "own":
        return class_batch(tasks, shape={"mlp": (5,), "conv": (1, 16, 16)}[net])
    batch = class_batch(tasks, shape=(2,))
    return batch._replace(support_x=batch.support_x.long() % 7, query_x=batch.query_x.long() % 7)


def plain_loop(algorithm, batch, loss="cross_entropy"):
    """Query losses `[T]` and logits `[T, Q, C]`: a task at a time, behind the encoder's one run."""
    model = algorithm.model
    slow = dict(model.named_parameters())
    adapts = algorithm.adapts or (lambda name: not name.startswith("films."))
    parts = [batch.support_x, batch.query_x]
    rows = algorithm.encoder(torch.cat([part.flatten(0, 1) for part in parts]))
    rows = rows.split([len(part) * part.shape[1] for part in parts])
    support, query = (found.unflatten(0, part.shape[:2]) for found, part in zip(rows, parts, strict=True))
    losses, predictions = [], []
    for sx, sy, qx, qy, sc, qc in zip(*batch, support, query, strict=True):
        fast = {name: p for name, p in slow.items() if adapts(name)}
        for _ in range(algorithm.inner_steps):
            value = LOSSES[loss](functional_call(model, slow | fast, (sx, sc)), sy)
            gradients = torch.autograd.grad(value, list(fast.values()), create_graph=not algorithm.first_order)
            fast = {n: w - algorithm.inner_lr * g for (n, w), g in zip(fast.items(), gradients, strict=True)}
        predictions.append(functional_call(model, slow | fast, (qx, qc)))
        losses.append(LOSSES[loss](predictions[-1], qy))
        if algorithm.training and algorithm.metric_weight:
            means = torch.stack([sc[sy == n].mean(0) for n in range(int(sy.max()) + 1)])
            metric = F.cross_entropy(-(qc.unsqueeze(1) - means).square().sum(2), qy)
            losses[-1] = losses[-1] + algorithm.metric_weight * metric
    return torch.stack(losses), torch.stack(predictions)


def assert_is_the_plain_loop(algorithm, batch, loss="cross_entropy", weights=None):
    losses, logits = plain_loop(algorithm, batch, loss)
    torch.testing.assert_close(algorithm(batch).logits, logits, rtol=1e-9, atol=1e-9)
    assert_same_meta_gradient(algorithm, batch, losses)


@pytest.mark.parametrize(
    "net, steps, options",
    [
        ("mlp", 0, {}),
        ("mlp", 1, {"metric_weight": 0.5}),
        ("mlp", 3, {}),
        ("mlp", 3, {"first_order": True, "metric_weight": 0.5}),
        ("conv", 0, {}),
        ("conv", 1, {"first_order": True}),
        ("conv", 3, {"metric_weight": 0.5}),
        ("own", 2, {}),
        ("own", 2, {"first_order": True}),
    ],
)
def test_equals_the_loop_over_tasks(net, steps, options):
    algorithm, batch = build(net, inner_steps=steps, inner_lr=0.4, **options), batch_for(net)
    assert_is_the_plain_loop(algorithm, batch)
    assert_is_the_plain_loop(algorithm.eval(), batch)


def test_regression_and_a_loss_of_ones_own():
    for loss in ("mse", lambda p, t: F.mse_loss(p, t)):
        algorithm = ConditionalCAML(small_mlp((5, 4)), FiLMMLP(4, [5, 8, 2]).double(), inner_steps=2, loss=loss)
        assert_is_the_plain_loop(algorithm, value_batch(), "mse")


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("task_chunk", [None, 2])
def test_weights_and_chunks(net, task_chunk):
    """The encoder's batch norm sees all tasks, whatever the chunks; weights multiply what each task counts."""
    algorithm, batch = build(net, inner_steps=2, metric_weight=0.5, task_chunk=task_chunk), batch_for(net, tasks=5)
    if net == "conv":
        algorithm.model.head.register_forward_hook(lambda *_: None)  # not mapped: the tasks run in turn
    losses, _ = plain_loop(algorithm, batch)
    assert_same_meta_gradient(algorithm, batch, losses)
    losses, _ = plain_loop(algorithm, batch)
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    output, parameters = algorithm(batch, weights), list(algorithm.parameters())
    torch.testing.assert_close(output.loss, (weights * losses).mean())
    # a task at a time, without a graph for all of them
    assert output.task_loss.requires_grad == (net == "mlp" and task_chunk is None)
    ours = torch.autograd.grad(output.loss, parameters, allow_unused=True, materialize_grads=True)
    truth = torch.autograd.grad((weights * losses).mean(), parameters, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("net", NETS)
def test_protocol(net):
    algorithm = build(net, inner_steps=2).eval()  # in train mode the encoder's batch norm mixes tasks
    assert_keeps_the_protocol(algorithm, batch_for(net))
    assert_saves_and_loads(build(net, 1).eval(), build(net).eval(), batch_for(net))


def test_what_adapts():
    """The base network's own weights alone: neither the transformations nor the metric space."""
    algorithm, batch = build("conv", inner_steps=1), batch_for("conv")
    state, slow = algorithm.adapt(batch.support_x, batch.support_y), dict(algorithm.model.named_parameters())
    assert set(algorithm.adapting) == {name for name in slow if not name.startswith("films.")}
    for name, fast in state.stacked().items():
        if not (name.startswith("convolutions.") and name.endswith("bias")):  # in front of a batch norm
            assert (fast != slow[name]).any() == (name in algorithm.adapting), name
    algorithm = ConditionalCAML(algorithm.encoder, algorithm.model, adapts=lambda name: name == "head.bias")
    assert algorithm.adapting == ["head.bias"] and "head.bias" in repr(algorithm)


def test_a_frozen_metric_space_is_left_as_it_is():
    algorithm, batch = build("mlp", inner_steps=2, task_chunk=2), batch_for("mlp")
    algorithm.encoder.requires_grad_(False)
    algorithm(batch).loss.backward()
    assert all(p.grad is None for p in algorithm.encoder.parameters())
    assert all(p.grad is not None for p in algorithm.model.parameters())


class Number(nn.Module):
    """Of examples that are a number each, large ones."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(4, 6), nn.Linear(6, 3)

    def forward(self, x, condition):
        return self.head(self.embedding(x - 2**40) + condition)


def test_numbers_reach_the_base_network_as_they_are():
    class Encoder(nn.Embedding):
        def forward(self, x):
            return super().forward(x - 2**40)

    torch.manual_seed(0)
    algorithm = ConditionalCAML(Encoder(4, 6), Number(), inner_steps=2)
    batch = class_batch(shape=(1,), dtype=torch.float32)
    support_x, query_x = (part.squeeze(2).long() % 4 + 2**40 for part in (batch.support_x, batch.query_x))
    batch = batch._replace(support_x=support_x, query_x=query_x)
    assert_same_meta_gradient(algorithm, batch, plain_loop(algorithm, batch)[0], 1e-5)
    assert algorithm(batch._replace(query_x=query_x[:, :0], query_y=batch.query_y[:, :0])).logits.shape == (3, 0, 3)


def test_examples_of_several_tensors():
    """Positional, and by name: the condition comes last, or by its name."""

    class Sum(nn.Linear):
        def forward(self, a, b):
            return super().forward(a + b.sum(2))

    class Pair(FiLMMLP):
        def forward(self, a, b, condition):
            return super().forward(a + b.sum(2), condition)

    torch.manual_seed(0)
    algorithm, batch = ConditionalCAML(Sum(5, 4).double(), Pair(4, [5, 8, 3]).double(), inner_steps=2), batch_for("mlp")
    parts = [(x / 2, torch.stack([x / 4, x / 4], 3)) for x in (batch.support_x, batch.query_x)]
    alike = ConditionalCAML(nn.Linear(5, 4).double(), FiLMMLP(4, [5, 8, 3]).double(), inner_steps=2)
    alike.load_state_dict(algorithm.state_dict())
    expected = alike(batch).task_loss
    for support_x, query_x in (parts, [{"a": a, "b": b} for a, b in parts]):
        output = algorithm(batch._replace(support_x=support_x, query_x=query_x))
        torch.testing.assert_close(output.task_loss, expected)


def test_another_base_network_is_seen():
    algorithm, batch = build("mlp", inner_steps=1), batch_for("mlp")
    algorithm(batch)
    algorithm.model = NETS["mlp"][1]().double()
    assert_is_the_plain_loop(algorithm, batch)


def test_arguments_are_checked():
    batch = batch_for("mlp")
    with pytest.raises(TypeError, match="adapts must be None or a callable"):
        ConditionalCAML(mlp([5, 4]), FiLMMLP(4, [5, 8, 3]), adapts="head")
    with pytest.raises(ValueError, match="adapts picks none of the parameters that require gradients: layers.0.weight"):
        ConditionalCAML(mlp([5, 4]), FiLMMLP(4, [5, 8, 3]), adapts=lambda name: False)
    with pytest.raises(ValueError, match="metric_weight must be at least 0"):
        build("mlp", metric_weight=-1.0)
    with pytest.raises(ValueError, match=r"encoder must return embeddings \[B, D\]"):
        ConditionalCAML(nn.Unflatten(1, (5, 1)), FiLMMLP(4, [5, 8, 3]))(batch)
    with pytest.raises(ValueError, match="must agree in example shape"):
        build("mlp")(batch._replace(query_x=batch.query_x[..., :4]))
    with pytest.raises(ValueError, match="query_y: cross_entropy"):
        build("mlp")(batch._replace(query_y=batch.query_y.int()))
    with pytest.raises(ValueError, match="image_size"):
        FiLMConv4(4, outputs=3, image_size=8)
    algorithm = build("mlp")
    with pytest.raises(ValueError, match="tasks"):
        algorithm.predict(algorithm.adapt(batch.support_x, batch.support_y), batch.query_x[:2])
    algorithm = ConditionalCAML(conv4(hidden=4), FiLMConv4(4, hidden=3, outputs=3, image_size=16)).eval()
    with pytest.raises(ValueError, match="track_running_stats=False"):
        algorithm(class_batch(shape=(1, 16, 16), dtype=torch.float32))


@pytest.mark.learning
def test_learns_which_directions_matter():
    """Chance is 0.2; without the modulation it ends below 0.7."""
    torch.manual_seed(0)
    options = {"inner_lr": 0.5, "inner_steps": 2, "metric_weight": 0.5}
    net = ConditionalCAML(mlp([20, 32, 8]), FiLMMLP(8, [20, 32, 5]), **options)
    train(net, hidden_signal, 150)
    after = judge(net, hidden_signal)
    net.inner_steps = 0
    before = judge(net, hidden_signal)
    assert before < 0.25 and after > 0.8, (before, after)
