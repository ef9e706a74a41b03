"""Losses: torch's own by formulas and in the kernels, rows that are ignored, parameters of a loss. Truth is the torch
module itself, applied to one task at a time, in float64."""

import copy
import math

import pytest
import torch
from module_kinds import plain
from torch import nn
from torch.nn import functional as F

from fastmeta.algorithms import MAML
from fastmeta.dispatch import native
from fastmeta.engines import ENGINES
from fastmeta.tasks import TaskBatch
from fastmeta.training.metrics import CalibrationError

T, S, Q, IN, C = 3, 5, 6, 4, 3
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
# a loss that picks rows by a mask: the engines that map are tried all the same
pytestmark = pytest.mark.filterwarnings("ignore:tasks run one after the other:UserWarning")
CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 0.7], dtype=torch.float64)


def check(found, right):
    torch.testing.assert_close(found, right, equal_nan=True, **CLOSE)


def make_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(IN, 7), nn.Tanh(), nn.Linear(7, C)).double()


def make_module(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(IN, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, C)).double()


def make_batch(targets="labels", seed=0):
    g = torch.Generator().manual_seed(seed)

    def pair(rows):
        x = torch.randn(T, rows, IN, generator=g, dtype=torch.float64)
        if targets == "values":
            return x, 2 * torch.randn(T, rows, C, generator=g, dtype=torch.float64)
        if targets in ("probabilities", "shares"):
            values = torch.randn(T, rows, C, generator=g, dtype=torch.float64)
            return x, values.softmax(-1) if targets == "probabilities" else values.sigmoid()
        y = torch.randint(C, (T, rows), generator=g)
        if targets == "ignored":  # as many as the task's index, and one
            y[torch.arange(rows) <= torch.arange(T).unsqueeze(1)] = -100
        return x, y

    return TaskBatch(*pair(S), *pair(Q))


def bce(**options):
    return nn.BCEWithLogitsLoss(**options)


# loss, targets, and its name in the kernels for these targets, if it has one
LOSSES = {
    "cross entropy": (nn.CrossEntropyLoss, "labels", "cross_entropy"),
    "cross entropy, the function": (lambda: F.cross_entropy, "labels", "cross_entropy"),
    "ignored": (nn.CrossEntropyLoss, "ignored", None),
    "ignored, the function": (lambda: F.cross_entropy, "ignored", None),
    "a class ignored": (lambda: nn.CrossEntropyLoss(ignore_index=1), "labels", None),
    "weights": (lambda: nn.CrossEntropyLoss(CLASS_WEIGHTS), "labels", None),
    "smoothing": (lambda: nn.CrossEntropyLoss(label_smoothing=0.2), "labels", None),
    "sum": (lambda: nn.CrossEntropyLoss(reduction="sum"), "labels", None),
    "smoothing, ignored": (lambda: nn.CrossEntropyLoss(label_smoothing=0.2), "ignored", None),
    "weights, smoothing, ignored": (lambda: nn.CrossEntropyLoss(CLASS_WEIGHTS, label_smoothing=0.2), "ignored", None),
    "weights, smoothing, ignored, sum": (
        lambda: nn.CrossEntropyLoss(CLASS_WEIGHTS, label_smoothing=0.2, reduction="sum"),
        "ignored",
        None,
    ),
    "probabilities": (nn.CrossEntropyLoss, "probabilities", None),
    "probabilities, weights, smoothing": (
        lambda: nn.CrossEntropyLoss(CLASS_WEIGHTS, label_smoothing=0.2),
        "probabilities",
        None,
    ),
    "squares": (nn.MSELoss, "values", "mse"),
    "squares, the function": (lambda: F.mse_loss, "values", "mse"),
    "squares, sum": (lambda: nn.MSELoss(reduction="sum"), "values", None),
    "huber": (lambda: nn.HuberLoss(delta=0.3), "values", "huber"),
    "huber, the function": (lambda: F.huber_loss, "values", "huber"),
    "huber, sum": (lambda: nn.HuberLoss(delta=0.3, reduction="sum"), "values", None),
    "smooth": (lambda: nn.SmoothL1Loss(beta=0.3), "values", None),
    "smooth, the function": (lambda: F.smooth_l1_loss, "values", "huber"),
    "smooth, beta 0": (lambda: nn.SmoothL1Loss(beta=0.0), "values", None),
    "sizes": (nn.L1Loss, "values", None),
    "sizes, the function": (lambda: F.l1_loss, "values", None),
    "binary": (bce, "shares", "binary_cross_entropy"),
    "binary, the function": (lambda: F.binary_cross_entropy_with_logits, "shares", "binary_cross_entropy"),
    "binary, positive weights": (lambda: bce(pos_weight=CLASS_WEIGHTS), "shares", None),
    "binary, weights, sum": (lambda: bce(weight=CLASS_WEIGHTS, pos_weight=CLASS_WEIGHTS + 1, reduction="sum"),
                             "shares", None),
}  # fmt: skip


def meta_gradient(learner, batch):
    """Losses of the tasks, and the gradient by name."""
    output = learner(batch)
    named = dict(learner.named_parameters())
    found = torch.autograd.grad(output.loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return output, {name.removeprefix("model."): g for name, g in zip(named, found, strict=True)}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", LOSSES)
def test_torch_losses_in_every_engine(name, engine):
    make, targets, in_kernels = LOSSES[name]
    net, loss, batch = make_net(), make(), make_batch(targets)
    maml = MAML(net, inner_lr=0.2, inner_steps=2, loss=loss, engine=engine)
    if engine == "fused" and in_kernels is None:
        with pytest.raises(ValueError, match=r"kernels (know .* only as a mean|have no loss)"):
            maml(batch)
        return
    losses, predictions, gradients = plain(net, batch, loss=loss, lr=0.2, steps=2)
    output, found = meta_gradient(maml, batch)
    check(output.task_loss.detach(), losses)
    check(output.logits.detach(), predictions)
    check(found, gradients)


@pytest.mark.parametrize("name", ["weights, smoothing, ignored", "probabilities, weights, smoothing", "huber"])
def test_first_order_and_modules(name):
    make, targets, _ = LOSSES[name]
    batch = make_batch(targets)
    for net, first_order in ((make_net(), True), (make_module(), False)):
        loss, options = make(), {"first_order": first_order}
        losses, _, gradients = plain(net, batch, loss=loss, lr=0.2, steps=2, **options)
        output, found = meta_gradient(MAML(net, inner_lr=0.2, inner_steps=2, loss=loss, **options), batch)
        check(output.task_loss.detach(), losses)
        check(found, gradients)


@pytest.mark.parametrize("engine", ["lowrank", "layerwise", "vmap", "loop"])
@pytest.mark.parametrize("name", ["ignored", "weights, smoothing, ignored"])
def test_a_support_set_of_which_nothing_counts(name, engine):
    """Its mean is 0 / 0, its gradient is 0."""
    net, loss, batch = make_net(), LOSSES[name][0](), make_batch("ignored")
    batch.support_y[1] = -100
    losses, _, gradients = plain(net, batch, loss=loss, lr=0.2, steps=2)
    output, found = meta_gradient(MAML(net, inner_lr=0.2, inner_steps=2, loss=loss, engine=engine), batch)
    assert losses.isfinite().all()
    check(output.task_loss.detach(), losses)
    check(found, gradients)


class Tagger(nn.Module):
    """A label for each of as many positions as there are classes, which are where torch has them: `[B, C, L]`."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(IN, 7), nn.Linear(7, C * C)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x))).unflatten(-1, (C, C))


@pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(CLASS_WEIGHTS, label_smoothing=0.1)])
def test_labels_of_positions(loss, engine):
    torch.manual_seed(0)
    net, (support_x, _, query_x, _) = Tagger().double(), make_batch()
    support_y, query_y = (torch.randint(C, (T, rows, C)) for rows in (S, Q))
    support_y[0, 0, 0] = query_y[:, 1, 1] = -100
    batch = TaskBatch(support_x, support_y, query_x, query_y)
    losses, predictions, gradients = plain(net, batch, loss=loss, lr=0.2, steps=2)
    output, found = meta_gradient(MAML(net, inner_lr=0.2, inner_steps=2, loss=loss, engine=engine), batch)
    check(output.task_loss.detach(), losses)
    check(found, gradients)
    right = [(p.argmax(1) == y)[y >= 0].double().mean() for p, y in zip(predictions, query_y, strict=True)]
    check(output.accuracy, torch.stack(right))


def test_gradients_of_batches_with_and_without_ignored_rows():
    net, loss = make_net(), nn.CrossEntropyLoss()
    maml = MAML(net, inner_lr=0.2, inner_steps=2, loss=loss)
    for targets in ("labels", "ignored", "labels", "labels"):
        batch, before = make_batch(targets), maml._direct
        losses, _, gradients = plain(net, batch, loss=loss, lr=0.2, steps=2)
        output, found = maml.gradients(batch)
        check(output.task_loss, losses)
        check({name.removeprefix("model."): g for name, g in found.items()}, gradients)
        if native.has_kernel("meta_loss_mlp_with_gradient", "cpu"):
            assert (maml._direct is None) == (targets == "ignored")
    assert maml._direct is before  # the same call but for the numbers


def test_a_delta_that_changes_after_a_plan_was_made():
    net, loss, batch = make_net(), nn.HuberLoss(), make_batch("values")
    maml = MAML(net, inner_lr=0.2, inner_steps=2, loss=loss)
    for delta in (1.0, 0.2, 0.5):
        loss.delta = delta
        losses, _, gradients = plain(net, batch, loss=loss, lr=0.2, steps=2)
        output, found = maml.gradients(batch)
        check(output.task_loss, losses)
        check({name.removeprefix("model."): g for name, g in found.items()}, gradients)


def test_settings_are_read_at_each_call():
    net, loss, batch = make_net(), nn.CrossEntropyLoss(CLASS_WEIGHTS.float()), make_batch("ignored")
    maml = MAML(net, inner_lr=0.2, loss=loss).double()  # the class weights, too

    def is_right(maml, loss):
        check(maml(batch).task_loss.detach(), plain(maml.model, batch, loss=loss, lr=0.2, steps=1)[0])

    assert loss.weight.dtype == torch.float64 and "loss_module.weight" in maml.state_dict()
    is_right(maml, loss)
    loss.weight[0] = 3.0
    is_right(maml, loss)
    loss.label_smoothing, loss.ignore_index = 0.3, 2
    batch = TaskBatch(*make_batch())
    is_right(maml, loss)
    twin = copy.deepcopy(maml)
    loss.reduction = "sum"
    is_right(maml, loss)
    is_right(twin, twin.loss_module)
    loss.register_forward_hook(lambda module, inputs, output: 2 * output)
    is_right(maml, loss)


class Doubled(nn.CrossEntropyLoss):
    def forward(self, prediction, target):
        return 2 * super().forward(prediction, target)


def overridden():
    loss = nn.CrossEntropyLoss()
    loss.forward = lambda prediction, target: prediction.square().mean()
    return loss


@pytest.mark.parametrize("make", [Doubled, overridden], ids=["subclass", "forward of its own"])
def test_what_only_looks_like_a_torch_loss(make):
    net, batch, loss = make_net(), make_batch(), make()
    losses, _, gradients = plain(net, batch, loss=loss, lr=0.2, steps=2)
    maml = MAML(net, inner_lr=0.2, inner_steps=2, loss=loss)
    output, found = meta_gradient(maml, batch)
    check(output.task_loss.detach(), losses)
    check(found, gradients)
    assert "autograd, mapped" in maml.explain(batch)


def test_explain_says_what_serves_the_loss():
    def line(loss, targets="labels"):
        return MAML(make_net(), loss=loss).explain(make_batch(targets)).splitlines()[1]

    assert line("cross_entropy") == line(nn.CrossEntropyLoss()) == "loss 'cross_entropy': kernels and formulas"
    known = "the kernels know 'CrossEntropyLoss' only as a mean, without class weights and label smoothing"
    assert line(nn.CrossEntropyLoss(), "ignored").startswith(f"loss 'CrossEntropyLoss': formulas: {known}")
    assert line(nn.L1Loss(), "values").endswith("formulas: the kernels have no loss 'L1Loss'")
    assert "one after the other" not in line(masked)
    maml, batch = MAML(make_net(), loss=masked), make_batch()
    maml(batch)
    assert "loss 'masked': autograd, one task after the other" in maml.explain(batch)


def masked(prediction, target):
    keep = target != 2
    return F.cross_entropy(prediction[keep], target[keep])


# what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.MSELoss, nn.KLDivLoss, nn.NLLLoss])
def test_a_loss_for_each_row_is_refused(loss):
    with pytest.raises(ValueError, match=f"{loss.__name__} with reduction='none'"):
        MAML(make_net(), loss=loss(reduction="none"))


def test_targets_that_torch_would_broadcast_or_not_take():
    net, batch = make_net(), make_batch("values")
    narrow = TaskBatch(batch[0], batch[1][..., 0], batch[2], batch[3][..., 0])
    with pytest.raises(ValueError, match="support_y: MSELoss takes floating-point targets of the prediction's shape"):
        MAML(net, loss=nn.MSELoss(reduction="sum"))(narrow)
    with pytest.raises(ValueError, match="support_y: CrossEntropyLoss takes probabilities of the prediction's shape"):
        MAML(net, loss=nn.CrossEntropyLoss())(narrow)
    labels = make_batch()
    with pytest.raises(ValueError, match="support_y: CrossEntropyLoss takes int64 labels of shape"):
        MAML(net, loss=nn.CrossEntropyLoss())(TaskBatch(labels[0], labels[1].int(), *labels[2:]))
    with pytest.raises(ValueError, match="query_y must lie in .* got 7"):
        MAML(net, loss=nn.CrossEntropyLoss(CLASS_WEIGHTS))(TaskBatch(*labels[:3], labels[3].fill_(7)))
    with pytest.raises(ValueError, match="weight must have shape .3., one for each class"):
        MAML(net, loss=nn.CrossEntropyLoss(CLASS_WEIGHTS[:2]))(make_batch())
    with pytest.raises(ValueError, match="pos_weight must broadcast"):
        MAML(net, loss=bce(pos_weight=CLASS_WEIGHTS[:2]))(make_batch("shares"))


@pytest.mark.parametrize("engine", ["auto", "layerwise"])
def test_the_named_loss_says_what_ignores_rows(engine):
    with pytest.raises(ValueError, match=r"got -100; loss=torch\.nn\.CrossEntropyLoss\(\) ignores rows so labelled"):
        MAML(make_net(), engine=engine)(make_batch("ignored"))


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["rate", "rates"])
def test_plain_autograd_looks_at_a_tasks_labels_once(monkeypatch, lr):
    names = []
    monkeypatch.setattr("fastmeta.engines._losses.label_range", lambda name, *_, **__: names.append(name))
    MAML(make_net(), inner_lr=lr, inner_steps=3, engine="loop")(make_batch())
    assert sorted(names) == ["query_y"] * T + ["support_y"] * T


# accuracy ------------------------------------------------------------------------------------------------------------


class OwnIgnoring:
    """No row of class 2 counts."""

    ignore_index = 2

    def __call__(self, prediction, target):
        return F.cross_entropy(prediction, target, ignore_index=2)


@pytest.mark.parametrize(
    ("loss", "counts"),
    [
        (nn.CrossEntropyLoss(), lambda y: y >= 0),
        (nn.CrossEntropyLoss(CLASS_WEIGHTS), lambda y: y >= 0),
        (lambda p, y: F.cross_entropy(p, y), lambda y: y >= 0),
        (OwnIgnoring(), lambda y: y != 2),
    ],
    ids=["mean", "weights", "callable", "callable that says it"],
)
def test_accuracy_counts_what_the_loss_counts(loss, counts):
    batch = make_batch("labels" if isinstance(loss, OwnIgnoring) else "ignored")
    for steps, net in ((1, make_net()), (1, make_module()), (0, make_net())):
        output = MAML(net, inner_lr=0.2, inner_steps=steps, loss=loss)(batch)
        kept = [counts(y) for y in batch.query_y]
        right = [
            (z.argmax(1) == y)[k].double().mean() for z, y, k in zip(output.logits, batch.query_y, kept, strict=True)
        ]
        check(output.accuracy, torch.stack(right))


def test_accuracy_of_nothing():
    batch = make_batch()
    batch.query_y[1] = -100
    output = MAML(make_net(), loss=nn.CrossEntropyLoss(reduction="sum"))(batch)
    assert [math.isnan(a) for a in output.accuracy.tolist()] == [False, True, False] and output.task_loss[1] == 0


def test_calibration_leaves_out_what_is_no_class():
    batch, g = make_batch("ignored"), torch.Generator().manual_seed(0)
    logits, counts = torch.randn(T, Q, C, generator=g), batch.query_y >= 0
    whole, parts = CalibrationError(), CalibrationError()
    whole.add(logits, batch.query_y)
    for z, y, kept in zip(logits, batch.query_y, counts, strict=True):
        parts.add(z[kept].unsqueeze(0), y[kept].unsqueeze(0))
    assert whole.read() == pytest.approx(parts.read(), rel=1e-12)
