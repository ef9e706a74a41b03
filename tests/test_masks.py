"""Tasks of unequal size in one batch, padded: every algorithm with an inner loop gives each what it would get alone."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastmeta import MAML, ProtoNet, TaskBatch
from fastmeta.algorithms import (
    ANIL,
    BOIL,
    CAVIA,
    ConditionalCAML,
    FiLMMLP,
    ImplicitMAML,
    MAMLPlusPlus,
    MetaSGD,
    Reptile,
)
from fastmeta.irl import MaxEntLoss
from fastmeta.nn import mlp
from fastmeta.training import evaluate
from fastmeta.training.metrics import CalibrationError

SIZES = ((4, 2), (3, 5), (1, 4), (4, 2))  # support and query rows; groups in an order that is not its own inverse
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


class Last(nn.Module):
    """Sequences [B, 5, 1]."""

    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


NETS = {
    "mlp": (lambda: mlp([5, 6, 3], "tanh"), (5,)),
    "batch-norm": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
        ),
        (1, 4, 4),
    ),
    "lstm": (Last, (5, 1)),
}
ALGORITHMS = {
    "maml": lambda net, **o: MAML(net, inner_lr=0.1, inner_steps=2, **o),
    "maml-vmap": lambda net, **o: MAML(net, inner_lr=0.1, inner_steps=2, engine="vmap", **o),
    "maml-loop": lambda net, **o: MAML(net, inner_lr=0.1, inner_steps=2, engine="loop", **o),
    "maml-no-steps": lambda net, **o: MAML(net, inner_lr=0.1, inner_steps=0, **o),
    "first-order": lambda net, **o: MAML(net, inner_lr=0.1, inner_steps=2, first_order=True, **o),
    "meta-sgd": lambda net, **o: MetaSGD(net, inner_steps=2, **o),
    "maml++": lambda net, **o: MAMLPlusPlus(net, inner_steps=2, **o),
    "anil": lambda net, **o: ANIL(net, inner_steps=2, **o),
    "boil": lambda net, **o: BOIL(net, inner_lr=0.1, **o),
    "imaml": lambda net: ImplicitMAML(net, inner_steps=3),
    "reptile": lambda net: Reptile(net, inner_lr=0.1, inner_steps=3, batch_size=2, optimizer="sgd").eval(),
}


def learner(name, net="mlp", **options):
    torch.manual_seed(0)
    return ALGORITHMS[name](NETS[net][0]().double(), **options)


def batch_of(shape, loss="cross_entropy", seed=0):
    """Padding rows lie anywhere and hold NaN, and labels that are none."""
    g = torch.Generator().manual_seed(seed)

    def part(counts):
        mask = torch.zeros(len(counts), 6, dtype=torch.bool)
        for of_task, rows in zip(mask, counts, strict=True):
            of_task[torch.randperm(6, generator=g)[:rows]] = True
        x = torch.randn(*mask.shape, *shape, generator=g, dtype=torch.float64)
        x[~mask] = math.nan
        if loss == "cross_entropy":
            return x, torch.randint(3, mask.shape, generator=g).masked_fill(~mask, 77), mask
        y = torch.randn(*mask.shape, 3, generator=g, dtype=torch.float64)
        return x, y.masked_fill(~mask.unsqueeze(2), math.nan), mask

    (sx, sy, sm), (qx, qy, qm) = (part(counts) for counts in zip(*SIZES, strict=True))
    return TaskBatch(sx, sy, qx, qy, sm, qm)


def split(batch):
    """Each task by itself, without padding."""
    return [
        TaskBatch(sx[sm][None], sy[sm][None], qx[qm][None], qy[qm][None])
        for sx, sy, qx, qy, sm, qm in zip(*batch, strict=True)
    ]


def gradients(algorithm, output):
    parameters = [p for p in algorithm.parameters() if p.requires_grad]
    return torch.autograd.grad(output.loss, parameters, allow_unused=True, materialize_grads=True)


def assert_as_alone(algorithm, batch, weights=None):
    shares = torch.ones(4, dtype=torch.float64) if weights is None else weights
    output = algorithm(batch, weights)
    truth = [algorithm(part) for part in split(batch)]
    losses = torch.cat([t.task_loss for t in truth])
    torch.testing.assert_close(output.task_loss, losses, **CLOSE)
    torch.testing.assert_close(output.loss, (shares * losses).mean(), **CLOSE)
    if batch.query_y.dtype == torch.int64:
        torch.testing.assert_close(output.accuracy, torch.cat([t.accuracy for t in truth]))
    for logits, right, mask in zip(output.logits, truth, batch.query_mask, strict=True):
        torch.testing.assert_close(logits[mask], right.logits[0], **CLOSE)
        assert not logits[~mask].any()
    of_tasks = [gradients(algorithm, t) for t in truth]
    for ours, *rights in zip(gradients(algorithm, algorithm(batch, weights)), *of_tasks, strict=True):
        right = sum(share / 4 * part for share, part in zip(shares, rights, strict=True))
        torch.testing.assert_close(ours, right, **CLOSE)
    state = algorithm.adapt(batch.support_x, batch.support_y, batch.support_mask)
    torch.testing.assert_close(algorithm.predict(state, batch.query_x, batch.query_mask), output.logits, **CLOSE)
    return output


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_task_gets_what_it_would_get_alone(name, net):
    algorithm = learner(name, net)
    if name == "maml++":
        algorithm.multi_step_iterations = 0  # the count moves on
    assert_as_alone(algorithm, batch_of(NETS[net][1]), torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64))


@pytest.mark.parametrize("name", ["maml", "maml-loop", "anil", "maml++"])
@pytest.mark.parametrize("loss", ["mse", F.smooth_l1_loss])
def test_other_losses_and_chunks(name, loss):
    algorithm = learner(name, loss=loss, task_chunk=1)
    if name == "maml++":
        algorithm.multi_step_iterations = 0
    assert_as_alone(algorithm, batch_of((5,), "values"))


class Shifted(nn.Module):
    """Takes a context."""

    def __init__(self):
        super().__init__()
        self.body, self.shift, self.out = nn.Linear(5, 4), nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x, context):
        return self.out(torch.tanh(self.body(x) + self.shift(context)))


@pytest.mark.parametrize("concatenate", [True, False])
def test_contexts(concatenate):
    torch.manual_seed(0)
    net = mlp([7, 6, 3], "tanh") if concatenate else Shifted()
    assert_as_alone(CAVIA(net.double(), 2, concatenate=concatenate, inner_steps=2), batch_of((5,)))


@pytest.mark.parametrize("options", [{}, {"metric_weight": 0.5}, {"metric_weight": 0.5, "task_chunk": 1}])
def test_a_metric_space_beside_the_loop(options):
    torch.manual_seed(0)
    encoder, seen = nn.Linear(5, 4), []
    algorithm = ConditionalCAML(encoder, FiLMMLP(4, [5, 6, 3]), inner_steps=2, **options).double()
    batch, labels = batch_of((5,)), torch.tensor([0, 2])  # of three outputs, one is never a class
    sy, qy = labels[batch.support_y % 2], labels[batch.query_y % 2]
    sy[2], qy[2] = 2, 2  # one support row
    sy[0][batch.support_mask[0]] = torch.tensor([0, 2, 2, 0])
    sy[1][batch.support_mask[1]] = torch.tensor([2, 2, 0])
    sy[3][batch.support_mask[3]] = torch.tensor([2, 0, 2, 0])
    batch = batch._replace(support_y=sy, query_y=qy)
    assert_as_alone(algorithm, batch)
    hook = encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    algorithm(batch)
    assert len(seen) == 1 and len(seen[0]) == sum(map(sum, SIZES))
    hook.remove()
    if options:
        with pytest.raises(ValueError, match="query_y: task 2 has a row of class 0, which has no support row"):
            algorithm(batch._replace(query_y=qy.index_fill(0, torch.tensor([2]), 0)))


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "binary_cross_entropy", "huber"])
def test_kernels_leave_out_the_same_rows_as_groups(loss, monkeypatch):
    """One call of the fused inner loops, against the groups."""
    algorithm, batch = learner("maml", loss=loss, engine="fused"), batch_of((5,), loss)
    weights = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
    if loss == "binary_cross_entropy":
        batch = batch._replace(support_y=batch.support_y.sigmoid(), query_y=batch.query_y.sigmoid())
    calls, whole = [], MAML._whole
    monkeypatch.setattr(MAML, "_whole", lambda self, *args: calls.append(args) or whole(self, *args))
    once = algorithm(batch, weights)
    assert not calls
    groups = super(MAML, algorithm)._masked(batch, weights)
    assert len(calls) == 3
    for ours, right in zip(once, groups, strict=True):
        if right is not None:
            torch.testing.assert_close(ours, right, **CLOSE)
    found, named = algorithm.gradients(batch, weights)
    torch.testing.assert_close(found.loss, once.loss.detach(), **CLOSE)
    for right, *ours in zip(gradients(algorithm, groups), gradients(algorithm, once), named.values(), strict=True):
        for gradient in ours:
            torch.testing.assert_close(gradient, right, **CLOSE)


def test_one_mask_is_enough():
    algorithm, batch = learner("maml-vmap"), batch_of((5,))
    support = batch._replace(query_x=torch.ones(4, 6, 5).double(), query_y=torch.ones(4, 6).long(), query_mask=None)
    assert_as_alone(algorithm, support._replace(query_mask=torch.ones(4, 6).bool()))
    torch.testing.assert_close(
        algorithm(support).task_loss, algorithm(support._replace(query_mask=torch.ones(4, 6).bool())).task_loss
    )
    query = batch._replace(support_x=torch.ones(4, 6, 5).double(), support_y=torch.ones(4, 6).long(), support_mask=None)
    assert_as_alone(algorithm, query._replace(support_mask=torch.ones(4, 6).bool()))
    assert algorithm(query).loss.isfinite()


def test_inputs_get_gradients():
    algorithm, batch = learner("maml"), batch_of((5,))
    for engine in ("fused", "vmap"):
        algorithm.engine = engine
        x, qx = batch.support_x.clone().requires_grad_(), batch.query_x.clone().requires_grad_()
        algorithm(batch._replace(support_x=x, query_x=qx)).loss.backward()
        for tensor, mask in ((x, batch.support_mask), (qx, batch.query_mask)):
            assert tensor.grad[mask].abs().min() > 0 and not tensor.grad[~mask].any()


def test_demonstrations_may_differ_in_number():
    """Rows of one trajectory belong together: the kernels would not know, so that tasks run in groups."""
    torch.manual_seed(0)
    loss = MaxEntLoss(samples=1, horizon=2)
    algorithm = MAML(mlp([5, 4, 1], "tanh").double(), loss=loss, inner_lr=0.1)
    x, y = torch.randn(2, 8, 5).double(), torch.randn(2, 8, 1).double()
    mask = torch.tensor([[1] * 8, [0] * 4 + [1] * 4]).bool()
    output = algorithm(TaskBatch(x, y, x, y, mask, mask))
    alone = algorithm(TaskBatch(x[1:, 4:], y[1:, 4:], x[1:, 4:], y[1:, 4:]))
    torch.testing.assert_close(output.task_loss[1:], alone.task_loss, **CLOSE)


@pytest.mark.parametrize("serial", [False, True])
def test_reptile_trains_on_the_tasks_own_rows_in_their_order(serial):
    """With all rows at each step nothing is drawn: tasks one by one, the slow weights moved in between if serial."""
    torch.manual_seed(0)
    options = {"inner_lr": 0.1, "inner_steps": 2, "optimizer": "sgd", "batch_size": None, "serial_rate": 0.5}
    algorithm, batch = Reptile(mlp([5, 4, 3], "tanh").double(), serial=serial, **options), batch_of((5,))
    weights = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
    one = Reptile(mlp([5, 4, 3], "tanh").double(), **options)
    one.load_state_dict(algorithm.state_dict())
    losses, moves = [], []
    for weight, part in zip(weights, split(batch), strict=True):
        output = one(part)
        losses.append(output.task_loss)
        moves.append([weight * g for g in gradients(one, output)])
        if serial:
            with torch.no_grad():
                for p, move in zip(one.parameters(), moves[-1], strict=True):
                    p -= 0.5 * move
    output = algorithm(batch, weights)
    torch.testing.assert_close(output.task_loss, torch.cat(losses), **CLOSE)
    torch.testing.assert_close(output.loss, (weights * torch.cat(losses)).mean(), **CLOSE)
    for ours, *of_tasks in zip(gradients(algorithm, output), *moves, strict=True):
        torch.testing.assert_close(ours, sum(of_tasks) * (0.5 if serial else 0.25), **CLOSE)


def test_minibatches_hold_no_padding():
    algorithm = learner("reptile").train()
    for _ in range(5):
        output = algorithm(batch_of((5,)))
        assert output.loss.isfinite() and all(g.isfinite().all() for g in gradients(algorithm, output))


def test_iterations_are_counted_once():
    algorithm, batch = learner("maml++", "batch-norm"), batch_of((1, 4, 4))
    algorithm(batch)
    assert algorithm.iteration == 1


@pytest.mark.parametrize("name", ["maml", "maml-vmap", "anil", "imaml", "reptile"])
def test_errors_name_the_mask(name):
    algorithm, batch = learner(name), batch_of((5,))
    state = algorithm.adapt(batch.support_x, batch.support_y, batch.support_mask)
    for which, use in (
        ("support_mask", lambda mask: algorithm(batch._replace(support_mask=mask))),
        ("query_mask", lambda mask: algorithm(batch._replace(query_mask=mask))),
        ("support_mask", lambda mask: algorithm.adapt(batch.support_x, batch.support_y, mask)),
        ("query_mask", lambda mask: algorithm.predict(state, batch.query_x, mask)),
    ):
        with pytest.raises(TypeError, match=f"{which} must be a bool tensor, got int64"):
            use(torch.ones(4, 6).long())
        with pytest.raises(ValueError, match=rf"{which} must have shape \[4, 6\]"):
            use(torch.ones(4, 5).bool())
    no_rows = batch.query_mask.clone()
    no_rows[2] = False
    with pytest.raises(ValueError, match="query_mask: task 2 has no rows"):
        algorithm(batch._replace(query_mask=no_rows))
    with pytest.raises(ValueError, match="query_y must lie in"):
        algorithm(batch._replace(query_y=batch.query_y.masked_fill(batch.query_mask, 5)))


def test_a_task_without_support_rows_stays_as_it_is():
    batch = batch_of((5,))
    nothing = batch.support_mask.clone()
    nothing[1] = False
    for engine in ("fused", "vmap"):
        algorithm = learner("maml")
        algorithm.engine = engine
        state = algorithm.adapt(batch.support_x, batch.support_y, nothing)
        for name, p in algorithm.model.named_parameters():
            torch.testing.assert_close(state[1][name], p)
        assert algorithm(batch._replace(support_mask=nothing)).loss.isfinite()


class Tasks:
    """The same four tasks at every call, of which the classes may be called otherwise."""

    kind, input_shape, output_size = "classification", (5,), 3

    def __init__(self, first):
        batch, labels = batch_of((5,)), torch.arange(6).remainder(3).expand(4, 6)
        support = batch.support_x.nan_to_num(1.0), labels + first
        self.batch = TaskBatch(*support, batch.query_x, batch.query_y + first, None, batch.query_mask)

    def sample(self, num_tasks, *, generator=None):
        return TaskBatch(*(part if part is None else part[:num_tasks] for part in self.batch))


@pytest.mark.parametrize("first", [0, 10_000])
def test_evaluation_counts_the_tasks_own_rows(first):
    algorithm = ProtoNet(nn.Linear(5, 3).double()).eval()
    found = evaluate(algorithm, Tasks(first), episodes=4)
    truth, accuracies, batch = CalibrationError(), [], Tasks(0).batch
    for task, mask in enumerate(batch.query_mask):
        qx, qy = batch.query_x[task][mask][None], batch.query_y[task][mask][None]
        output = algorithm(TaskBatch(batch.support_x[task][None], batch.support_y[task][None], qx, qy))
        truth.add(output.logits, qy)
        accuracies.append(output.accuracy.item())
    assert found.accuracy.mean == pytest.approx(sum(accuracies) / 4)
    assert found.calibration_error == pytest.approx(truth.read())


def test_evaluation_on_inputs_of_several_tensors():
    class Pairs(Tasks):
        def sample(self, num_tasks, *, generator=None):
            batch = super().sample(num_tasks)
            return batch._replace(support_x=(batch.support_x,), query_x=(batch.query_x,))

    algorithm = ProtoNet(nn.Linear(5, 3).double()).eval()
    one, several = (evaluate(algorithm, source(0), episodes=4) for source in (Tasks, Pairs))
    assert one == several


class Tokens(nn.Module):
    """Of values and which of them count, with a second output."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Linear(1, 4), nn.Linear(4, 3)

    def forward(self, values, counts):
        hidden = torch.tanh(self.embed(values.unsqueeze(2)))
        pooled = (hidden * counts.unsqueeze(2)).sum(1) / counts.sum(1, keepdim=True).clamp_min(1)
        return {"logits": self.out(pooled), "pooled": pooled, "of all rows": pooled.sum((0, 1))}


def of_dict(prediction, target):
    return F.cross_entropy(prediction["logits"], target["labels"]) + 0.1 * prediction["pooled"].square().mean()


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_inputs_targets_and_predictions_of_several_tensors(engine):
    torch.manual_seed(0)
    algorithm, batch = MAML(Tokens().double(), inner_lr=0.1, loss=of_dict, engine=engine), batch_of((5,))

    def of_several(batch):
        x, qx = ({"values": x, "counts": (x > -0.5).double()} for x in (batch.support_x, batch.query_x))
        y, qy = ({"labels": y} for y in (batch.support_y, batch.query_y))
        return batch._replace(support_x=x, support_y=y, query_x=qx, query_y=qy)

    output, truth = algorithm(of_several(batch)), [algorithm(of_several(part)) for part in split(batch)]
    torch.testing.assert_close(output.task_loss, torch.cat([t.task_loss for t in truth]), **CLOSE)
    of_tasks = [gradients(algorithm, t) for t in truth]
    for ours, *rights in zip(gradients(algorithm, output), *of_tasks, strict=True):
        torch.testing.assert_close(ours, sum(rights) / 4, **CLOSE)
    several = of_several(batch)
    state = algorithm.adapt(several.support_x, several.support_y, batch.support_mask)
    predicted = algorithm.predict(state, several.query_x, batch.query_mask)
    for logits in (output.logits, predicted):
        for task, mask in enumerate(batch.query_mask):
            for name in ("logits", "pooled"):
                torch.testing.assert_close(logits[name][task][mask], truth[task].logits[name][0], **CLOSE)
                assert not logits[name][task][~mask].any()
            torch.testing.assert_close(logits["of all rows"][task], truth[task].logits["of all rows"][0], **CLOSE)


def test_lazy_layers_see_no_padding():
    torch.manual_seed(0)
    for use in (lambda a, b: a(b), lambda a, b: a.adapt(b.support_x, b.support_y, b.support_mask)):
        algorithm, seen = MAML(nn.Sequential(nn.LazyLinear(3, dtype=torch.float64)), engine="loop"), []
        algorithm.model.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        use(algorithm, batch_of((5,)))
        assert seen and all(x.isfinite().all() for x in seen)


def test_explain_says_how_masks_are_served():
    batch = batch_of((5,))
    assert "masks: the kernels leave out rows" in learner("maml").explain(batch)
    assert "masks: 3 groups of tasks" in learner("maml-vmap").explain(batch)
