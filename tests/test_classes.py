"""Classes of a task are those of its support rows, whatever their labels: against each task alone, without padding and
with its classes numbered from 0."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fastmeta import ProtoNet, TaskBatch, functional
from fastmeta.algorithms import (
    Contrastive,
    FiLMMLP,
    GradientHead,
    Hypernetwork,
    InContextCAML,
    MatchingNetwork,
    ModulatedProtoNet,
    NearestNeighbour,
    RelationMLP,
    RelationNetwork,
    RidgeHead,
)
from fastmeta.algorithms._classes import _count, _count_on_device, ordinary_ways
from fastmeta.nn import mlp

LEARNERS = {
    "protonet": lambda f, **o: ProtoNet(f, **o),
    "protonet-euclidean": lambda f, **o: ProtoNet(f, metric="euclidean", **o),
    "mean": lambda f, **o: NearestNeighbour(f, centre="support", normalise=True, **o),
    "nearest": lambda f, **o: NearestNeighbour(f, rule="nearest", **o),
    "ridge": lambda f, **o: RidgeHead(f, **o),
    "gradient-head": lambda f, **o: GradientHead(f, inner_steps=2, **o),
    "matching": lambda f, **o: MatchingNetwork(f, **o),
    "matching-context": lambda f, **o: MatchingNetwork(f, full_context=True, features=4, **o),
    "relation": lambda f, **o: RelationNetwork(f, RelationMLP(4, 6), **o),
    "relation-mean": lambda f, **o: RelationNetwork(f, RelationMLP(4, 6), pool="mean", loss="cross_entropy", **o),
    "in-context": lambda f, **o: InContextCAML(f, 4, code_width=12, heads=4, feedforward=8, **o),
    "in-context-once": lambda f, **o: InContextCAML(
        f, 4, code_width=12, heads=4, feedforward=8, query_in_context=False, **o
    ),
    "modulation": lambda f, **o: ModulatedProtoNet(f, FiLMMLP(8, [5, 6, 4]), **o),
    "hypernetwork": lambda f, **o: Hypernetwork(f, 4, mode="lowrank", hidden=(5,), set_width=6, rank=2, **o),
    "contrastive": lambda f, **o: Contrastive(f, head="ridge", centre="support", fine_tune_steps=1, **o).eval(),
}
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def learner(name, **options):
    torch.manual_seed(0)
    return LEARNERS[name](mlp([5, 6, 4], "tanh"), **options).double()


def tasks(labels, support=(2, 2, 2), query=(2, 2, 2), masked=False, seed=0):
    """A task for each list of labels, with so many rows of each class; padding rows lie anywhere and hold NaN and any
    label."""
    g = torch.Generator().manual_seed(seed)

    def part(counts):
        rows = [torch.tensor(of_task).repeat_interleave(torch.tensor(counts[: len(of_task)])) for of_task in labels]
        size = max(map(len, rows)) + (2 if masked else 0)
        x, y = torch.randn(len(rows), size, 5, generator=g, dtype=torch.float64), torch.empty(len(rows), size).long()
        mask = torch.zeros(len(rows), size, dtype=torch.bool)
        for task, own in enumerate(rows):
            places = torch.randperm(size, generator=g)[: len(own)]
            mask[task, places] = True
            y[task, places] = own
        assert masked or mask.all()
        x[~mask], y[~mask] = math.nan, -(2**62)
        return x, y, mask

    (sx, sy, sm), (qx, qy, qm) = part(support), part(query)
    return TaskBatch(sx, sy, qx, qy, *((sm, qm) if masked else ()))


def without_class_1(batch):
    """The same with no row of that class in the second task."""
    sy, qy = batch.support_y.clone(), batch.query_y.clone()
    sy[1][sy[1] == 1] = 0
    qy[1][qy[1] == 1] = 2
    return batch._replace(support_y=sy, query_y=qy)


FAR = 2**63 - 1
CASES = {
    "of the data set": tasks([[30, 71, 12], [7, 8, 90], [0, 1, 2]]),
    "negative and huge": tasks([[-(2**63), FAR, -3], [0, 1, 2], [FAR, FAR - 1, 5]]),
    "a class is missing": without_class_1(tasks([[0, 1, 2]] * 3)),
    "unequal ways": tasks([[4, 9, 2], [4, 9], [1, 9]], (2, 1, 3), (1, 3, 2), masked=True),
    "unequal and far": tasks([[4, -9, 2], [10**12, 9], [5, 6, 7]], (2, 1, 3), (1, 3, 2), masked=True),
}


def whole(mask, y):
    return torch.ones_like(y, dtype=torch.bool) if mask is None else mask


def alone(net, batch, task):
    """The task by itself, renumbered, and its classes."""
    own, queries = whole(batch.support_mask, batch.support_y)[task], whole(batch.query_mask, batch.query_y)[task]
    classes = batch.support_y[task][own].unique()
    number = {int(label): n for n, label in enumerate(classes)}
    sy, qy = (
        torch.tensor([[number[int(label)] for label in y]])
        for y in (batch.support_y[task][own], batch.query_y[task][queries])
    )
    return TaskBatch(batch.support_x[task][own][None], sy, batch.query_x[task][queries][None], qy), classes, queries


def gradients(net, loss):
    if not loss.requires_grad:
        return []
    return torch.autograd.grad(loss, list(net.parameters()), allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LEARNERS)
def test_every_task_gets_what_it_would_get_alone(name, case):
    net, batch = learner(name), CASES[case]
    weights = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    modes = (False,) if name == "contrastive" else (True, False)
    for training in modes:
        net.train(training)
        output = net(batch, weights)
        parts = [alone(net, batch, task) for task in range(3)]
        truth = [net(part) for part, _, _ in parts]
        losses = torch.cat([t.task_loss for t in truth])
        torch.testing.assert_close(output.task_loss, losses, **CLOSE)
        torch.testing.assert_close(output.loss, (weights * losses).mean(), **CLOSE)
        torch.testing.assert_close(output.accuracy, torch.cat([t.accuracy for t in truth]))
        for ours, right in zip(gradients(net, output.loss), gradients(net, (weights * losses).mean()), strict=True):
            torch.testing.assert_close(ours, right, **CLOSE)
    far = case in ("negative and huge", "unequal and far")
    assert (output.classes is not None) == far
    for task, (_, classes, queries) in enumerate(parts):
        logits = output.logits[task][queries]
        columns = output.classes[task, : len(classes)] if far else torch.arange(output.logits.shape[2])
        places = (columns.unsqueeze(0) == classes.unsqueeze(1)).int().argmax(1)
        torch.testing.assert_close(logits[:, places], truth[task].logits[0], **CLOSE)
        others = torch.ones(logits.shape[1], dtype=torch.bool).index_fill_(0, places, False)
        assert (logits[:, others] == -math.inf).all()
        assert not output.logits[task][~queries].any()
    state = net.adapt(batch.support_x, batch.support_y, batch.support_mask)
    torch.testing.assert_close(net.predict(state, batch.query_x, batch.query_mask), output.logits, **CLOSE)


@pytest.mark.parametrize("name", LEARNERS)
def test_columns(name):
    """Column c is class c, as wide as `ways` and the labels ask for; `ways` bounds the number of classes alone."""
    net = learner(name, ways=4).eval()
    for labels, width in (([[0, 1, 2], [0, 1, 2]], 4), ([[0, 1, 9], [0, 1, 2]], 10), ([[0, 8191], [5, 6]], 8192)):
        output = net(tasks(labels))
        assert output.logits.shape[2] == width and output.classes is None
        answers = output.logits.argmax(2)
        assert all(torch.isin(of_task, torch.tensor(own)).all() for of_task, own in zip(answers, labels, strict=True))
    output = net(tasks([[0, 8192], [5, 6]]))
    torch.testing.assert_close(output.classes, torch.tensor([[0, 8192], [5, 6]]))
    assert output.logits.shape[2] == 2


@pytest.mark.parametrize("name", LEARNERS)
def test_query_masks_alone(name):
    """A state of tasks that are alike serves queries of any number; what stands in padding rows reaches nothing."""
    net, batch = learner(name).eval(), tasks([[0, 1, 2]] * 3)
    state = net.adapt(batch.support_x, batch.support_y)
    mask = torch.tensor([[1, 1, 0, 1, 0, 1], [0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]).bool()
    truth = net.predict(state, batch.query_x)
    holes = batch.query_x.masked_fill(~mask.unsqueeze(2), math.nan)
    torch.testing.assert_close(net.predict(state, holes, mask), truth.masked_fill(~mask.unsqueeze(2), 0), **CLOSE)


def test_the_encoder_sees_the_tasks_own_rows_once():
    """Batch norm has the statistics of them and of nothing else."""
    torch.manual_seed(0)
    net = ProtoNet(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))).double()
    batch, seen = CASES["unequal ways"], []
    net.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(batch)
    x, mask = torch.cat([batch.support_x, batch.query_x], 1), torch.cat([batch.support_mask, batch.query_mask], 1)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], x[mask])


class TorchRelation(nn.Module):
    """A relation that looks at all pairs."""

    def forward(self, classes, query):
        scores = query @ classes.mT
        return scores - scores.mean((1, 2), keepdim=True)


def test_a_relation_module_never_sees_padding():
    net, batch = RelationNetwork(mlp([5, 4]).double(), TorchRelation()), CASES["unequal ways"]
    state = net.adapt(batch.support_x, batch.support_y, batch.support_mask)
    torch.testing.assert_close(net.predict(state, batch.query_x, batch.query_mask), net(batch).logits, **CLOSE)
    part, classes, queries = alone(net, batch, 0)
    torch.testing.assert_close(net(batch).logits[0][queries][:, classes], net(part).logits[0], **CLOSE)


@pytest.mark.parametrize(
    "make", [lambda f: RidgeHead(f, loss="mse"), lambda f: Hypernetwork(f, 4, outputs=2, hidden=(5,), set_width=6)]
)
def test_regression(make):
    torch.manual_seed(0)
    net, batch = make(mlp([5, 4]).double()).double(), CASES["unequal ways"]
    values = [torch.randn(*y.shape, 2).double() for y in (batch.support_y, batch.query_y)]
    values = [v.masked_fill(~m.unsqueeze(2), math.nan) for v, m in zip(values, batch[4:], strict=True)]
    batch = batch._replace(support_y=values[0], query_y=values[1])
    parts = [
        TaskBatch(sx[sm][None], sy[sm][None], qx[qm][None], qy[qm][None])
        for sx, sy, qx, qy, sm, qm in zip(*batch, strict=True)
    ]
    output, truth = net(batch), [net(part) for part in parts]
    loss = torch.cat([t.task_loss for t in truth]).mean()
    torch.testing.assert_close(output.loss, loss, **CLOSE)
    for ours, right in zip(gradients(net, output.loss), gradients(net, loss), strict=True):
        torch.testing.assert_close(ours, right, **CLOSE)
    for logits, right, mask in zip(output.logits, truth, batch.query_mask, strict=True):
        torch.testing.assert_close(logits[mask], right.logits[0], **CLOSE)
        assert not logits[~mask].any()
    state = net.adapt(batch.support_x, batch.support_y, batch.support_mask)
    torch.testing.assert_close(net.predict(state, batch.query_x, batch.query_mask), output.logits, **CLOSE)


@pytest.mark.parametrize("name", LEARNERS)
def test_errors_name_the_task(name):
    net, batch = learner(name), tasks([[0, 1, 2]] * 3)
    strange = batch.query_y.clone()
    strange[1, 3] = 7
    with pytest.raises(ValueError, match="query_y: task 1 has a row of class 7, which has no support row"):
        net(batch._replace(query_y=strange))
    whole_mask, no_rows = torch.ones(3, 6).bool(), torch.ones(3, 6).bool()
    whole_mask[1, 3] = no_rows[2] = False
    net(batch._replace(query_y=strange, query_mask=whole_mask))  # the row is padding
    missing = batch.support_y.clone()
    missing[2] = missing[2].clamp_max(1)
    with pytest.raises(ValueError, match="query_y: task 2 has a row of class 2, which has no support row"):
        net(batch._replace(support_y=missing))
    with pytest.raises(ValueError, match="support_mask: task 2 has no support rows"):
        net(batch._replace(support_mask=no_rows))
    with pytest.raises(ValueError, match="support_mask: task 2 has no support rows"):
        net.adapt(batch.support_x, batch.support_y, no_rows)
    with pytest.raises(ValueError, match="query_mask: task 2 has no rows"):
        net(batch._replace(query_mask=no_rows))
    with pytest.raises(ValueError, match="support_y: task 0 has 3 classes, more than ways = 2"):
        learner(name, ways=2)(batch)
    state = net.adapt(batch.support_x, batch.support_y)
    for which, use in (
        ("support_mask", lambda mask: net(batch._replace(support_mask=mask))),
        ("query_mask", lambda mask: net(batch._replace(query_mask=mask))),
        ("support_mask", lambda mask: net.adapt(batch.support_x, batch.support_y, mask)),
        ("query_mask", lambda mask: net.predict(state, batch.query_x, mask)),
    ):
        with pytest.raises(TypeError, match=f"{which} must be a bool tensor, got float32"):
            use(torch.ones(3, 6))
        with pytest.raises(ValueError, match=rf"{which} must have shape \[3, 6\]"):
            use(torch.ones(3, 5).bool())


@pytest.mark.parametrize("name", LEARNERS)
def test_no_tasks(name):
    net, batch = learner(name).eval(), TaskBatch(*(part[:0] for part in CASES["unequal ways"]))
    for part in (batch, TaskBatch(*batch[:4])):
        assert net(part).task_loss.shape == (0,)
        state = net.adapt(part.support_x, part.support_y, part.support_mask)
        assert net.predict(state, part.query_x, part.query_mask).shape == (*part.query_y.shape, 1)


@pytest.mark.filterwarnings("ignore:There is a performance drop.*aten.._scaled_dot_product_flash_attention:UserWarning")
# torch does not map over an LSTM, and a frozen encoder has no gradient
@pytest.mark.parametrize("name", sorted(LEARNERS.keys() - {"matching-context", "contrastive", "mean", "nearest"}))
def test_under_torch_func(name):
    """What is differentiated has labels to look at; so has what is mapped over, where all tasks have to be alike."""
    net = learner(name, ways=4).train()

    def loss(parameters, *batch):
        return torch.func.functional_call(net, parameters, (TaskBatch(*batch),)).loss

    parameters, plain = dict(net.named_parameters()), tasks([[0, 1, 2]] * 3)
    for batch in (plain, CASES["unequal and far"]):
        truth = gradients(net, net(batch).loss)
        for ours, right in zip(torch.func.grad(loss)(parameters, *batch).values(), truth, strict=True):
            torch.testing.assert_close(ours, right, **CLOSE)
    one_by_one = [part.unsqueeze(1) for part in plain]
    mapped = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0, 0))
    with pytest.raises(ValueError, match="support_y: tasks that torch.func.vmap maps over .* N = ways = 4"):
        mapped(parameters, *one_by_one)
    net.ways = None
    for ours, right in zip(mapped(parameters, *one_by_one).values(), gradients(net, net(plain).loss), strict=True):
        torch.testing.assert_close(ours.mean(0), right, **CLOSE)


def test_where_there_are_no_numbers():
    """Shapes are found without looking at labels, which fake and traced tensors have not."""
    net, batch = learner("protonet", ways=3).eval(), tasks([[0, 1, 2]] * 3)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert net([mode.from_tensor(part) for part in batch]).logits.shape == (3, 6, 3)
    traced = make_fx(lambda *parts: net(parts).loss)(*batch)
    torch.testing.assert_close(traced(*batch), net(batch).loss)


def test_half_precision():
    """A ridge regression is solved in float32 at least."""
    net, batch = learner("contrastive").float(), tasks([[0, 1, 2]] * 3)
    batch = TaskBatch(batch[0].float(), batch[1], batch[2].float(), batch[3])
    truth = net(batch).logits
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net(batch).logits.float(), truth, rtol=0.05, atol=0.05)
    net.bfloat16()
    found = net([batch[0].bfloat16(), batch[1], batch[2].bfloat16(), batch[3]])
    assert found.logits.dtype == torch.bfloat16
    torch.testing.assert_close(found.logits.float(), truth, rtol=0.05, atol=0.05)


def test_views_have_no_masks():
    views = torch.randn(2, 4, 5)
    y, mask = torch.zeros(2, 4).long(), torch.ones(2, 4).bool()
    with pytest.raises(ValueError, match="support_mask and query_mask"):
        Contrastive(mlp([5, 4]))(TaskBatch(views, y, views, y, mask, mask))


@pytest.mark.parametrize("tasks_", [2, 60])
def test_what_is_ordinary(tasks_):
    """Few labels on the host, many, and those of a device are counted in other ways."""
    y = torch.arange(3).repeat(tasks_, 2)
    missing, more, negative, huge = y.clone(), y.clone(), y - 1, y.clone()
    missing[-1], more[-1, 0], huge[-1, 0] = torch.tensor([0, 1, 1, 0, 1, 1]), 3, 2**40
    for labels, count in ((y, 3), (missing, 0), (more, 0), (negative, 0), (huge, 0)):
        assert _count(labels) == _count_on_device(labels).item() == count
        assert ordinary_ways(labels, y, None) == (count or None)
    assert ordinary_ways(y, y, 3) == 3 and ordinary_ways(y, y, 4) is None
    assert ordinary_ways(y, y - 1, 3) is None and ordinary_ways(y, y + 1, 3) is None


def test_compiled_learners_look_at_labels_where_the_number_of_classes_is_theirs_to_tell():
    torch._dynamo.reset()
    torch.manual_seed(0)
    labels = torch.tensor([[30, 30, 35, 35, 2, 2], [1, 2, 1, 2, 1, 2]])
    batch = TaskBatch(torch.randn(2, 6, 4), labels, torch.randn(2, 6, 4), labels)
    net = ProtoNet(nn.Linear(4, 5))
    torch.testing.assert_close(torch.compile(net, backend="eager")(batch).loss, net(batch).loss)


def test_names_of_classes_alone_leave_the_fused_loss(monkeypatch):
    torch.manual_seed(0)
    y = torch.arange(3).repeat_interleave(2).repeat(2, 1)
    names = torch.tensor([[30, 71, 12], [5, 900, 7]])
    x, net, calls = torch.randn(2, 6, 4), ProtoNet(nn.Linear(4, 5)), []
    fused = functional.prototypical_loss
    monkeypatch.setattr(functional, "prototypical_loss", lambda *args: calls.append(args) or fused(*args))
    right = net(TaskBatch(x, y, x, y))
    labels = names.gather(1, y)
    found = net(TaskBatch(x, labels, x, labels))
    assert len(calls) == 2 and found.logits is None
    torch.testing.assert_close(found.task_loss, right.task_loss)
    mask = torch.ones(2, 6, dtype=torch.bool)
    net(TaskBatch(x, labels, x, labels, mask))  # padding has a class of its own
    assert len(calls) == 2
