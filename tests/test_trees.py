"""Inputs, targets and predictions of several tensors give what plain autograd gives, one task at a time."""

import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from module_kinds import QUERY, SUPPORT, TASKS, WAYS, adapted, plain
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.algorithms import (
    ANIL,
    BOIL,
    CAVIA,
    MAML,
    Contrastive,
    GradientHead,
    ImplicitMAML,
    MAMLPlusPlus,
    MatchingNetwork,
    MetaSGD,
    ModulatedProtoNet,
    ProtoNet,
    RelationMLP,
    RelationNetwork,
    Reptile,
)
from fastmeta.tasks import TaskBatch

CLOSE = {"rtol": 1e-7, "atol": 1e-9}
WIDTH = 4


def check(found, right):
    torch.testing.assert_close(found, right, **CLOSE)


@dataclass(frozen=True)
class Rows:
    x: Tensor
    mask: Tensor
    scale: float = 2.0


class Pair(NamedTuple):
    x: Tensor
    mask: Tensor


@dataclass
class Found:
    logits: Tensor
    hidden: Tensor
    cache: Any = None


@dataclass
class ModelOutput(OrderedDict):
    """A dict that is a dataclass too, with its entries as attributes, as language models return."""

    logits: Tensor = None
    hidden: Tensor = None
    cache: Any = None

    def __post_init__(self):
        for name in ("logits", "hidden"):
            self[name] = getattr(self, name)

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)


class Both(NamedTuple):
    logits: Tensor
    hidden: Tensor


# how two tensors are handed over, and what the model makes of its arguments
GIVEN = {
    "tensor": (lambda x, mask: x, lambda x: (x, torch.ones_like(x))),
    "tuple": (lambda x, mask: (x, mask), lambda x, mask: (x, mask)),
    "list": (lambda x, mask: [x, mask], lambda x, mask: (x, mask)),
    "dict": (lambda x, mask: {"mask": mask, "x": x, "flag": None}, lambda x, mask, flag=1: (x, mask)),
    "dataclass": (lambda x, mask: Rows(x, mask), lambda rows: (rows.x * rows.scale, rows.mask)),
    "named tuple": (lambda x, mask: Pair(x, mask), lambda pair: (pair.x, pair.mask)),
    "nested": (lambda x, mask: {"both": (x, [mask, None])}, lambda both: (both[0], both[1][0])),
}
# what it returns, and where in it the two tensors are
RETURNS = {
    "tensor": (lambda y, h: y, lambda p: (p, p)),
    "dict": (lambda y, h: {"hidden": h, "logits": y, "name": "it"}, lambda p: (p["logits"], p["hidden"])),
    "tuple": (lambda y, h: (y, h), lambda p: (p[0], p[1])),
    "dataclass": (lambda y, h: Found(y, h), lambda p: (p.logits, p.hidden)),
    "model output": (lambda y, h: ModelOutput(y, h), lambda p: (p.logits, p["hidden"])),
    "named tuple": (lambda y, h: Both(y, h), lambda p: (p.logits, p.hidden)),
    "nested": (lambda y, h: {"a": [y, None, 3], "b": Found(h.sum(), h)}, lambda p: (p["a"][0], p["b"].hidden)),
}
KINDS = [
    ("tuple", "tensor"),
    ("dict", "dict"),
    ("tensor", "tuple"),
    ("dataclass", "dataclass"),
    ("named tuple", "named tuple"),
    ("nested", "nested"),
    ("list", "model output"),
]
SOME = [("tuple", "dataclass"), ("dict", "nested")]


class Net(nn.Module):
    def __init__(self, given, returns, width=WAYS):
        super().__init__()
        self.unpack, self.pack = GIVEN[given][1], RETURNS[returns][0]
        self.first, self.out = nn.Linear(WIDTH, 6), nn.Linear(6, width)

    def forward(self, *args, **kwargs):
        x, mask = self.unpack(*args, **kwargs)
        h = torch.tanh(self.first(x * mask + 0.3 * mask))
        return self.pack(self.out(h), h)


class Flat(nn.Module):
    """The same on one tensor that holds both beside each other."""

    def __init__(self, width=WAYS):
        super().__init__()
        self.first, self.out = nn.Linear(WIDTH, 6), nn.Linear(6, width)

    def forward(self, both, *context):
        x, mask = both.chunk(2, -1)
        h = torch.tanh(self.first(x * mask + 0.3 * mask))
        return self.out(h + context[0].mean() if context else h)


def make(*args, seed=0, of=Net):
    torch.manual_seed(seed)
    return of(*args).double()


def numbers(seed=1):
    """Two inputs and labels of support and query."""
    g = torch.Generator().manual_seed(seed)

    def part(rows):
        x = torch.randn(TASKS, rows, WIDTH, generator=g, dtype=torch.float64)
        mask = (torch.rand(TASKS, rows, WIDTH, generator=g) > 0.3).double()
        return x, mask, torch.arange(TASKS * rows).reshape(TASKS, rows) % WAYS

    return *part(SUPPORT), *part(QUERY)


def batches(given):
    """As a learner takes them, and as the plain loop does."""
    sx, sm, sy, qx, qm, qy = numbers()
    pack = GIVEN[given][0]
    each = [[pack(x, m) for x, m in zip(xs, ms, strict=True)] for xs, ms in ((sx, sm), (qx, qm))]
    return TaskBatch(pack(sx, sm), sy, pack(qx, qm), qy), (each[0], sy, each[1], qy)


def flat_batch():
    sx, sm, sy, qx, qm, qy = numbers()
    return TaskBatch(torch.cat([sx, sm], -1), sy, torch.cat([qx, qm], -1), qy)


def loss_for(returns):
    """One that needs both tensors."""

    def loss(prediction, target):
        logits, hidden = RETURNS[returns][1](prediction)
        return F.cross_entropy(logits, target) + 0.3 * hidden.square().mean()

    return loss


def gradient(output, net):
    named = {n: p for n, p in net.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(output.loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize("first_order", [False, True], ids=["second order", "first order"])
@pytest.mark.parametrize("kind", KINDS, ids=" to ".join)
def test_maml(kind, first_order):
    given, returns = kind
    net, (batch, each), seen = make(*kind), batches(given), RETURNS[returns][1]
    loss = loss_for(returns)
    options = {"lr": 0.3, "steps": 2, "first_order": first_order, "loss": loss}
    losses, predictions, gradients = plain(net, each, **options, seen=lambda p: torch.cat(seen(p), -1))
    right = adapted(net, each[0][1], each[1][1], **options)
    for engine, task_chunk in (("auto", None), ("vmap", None), ("loop", None), ("vmap", 2), ("loop", 2)):
        maml = MAML(
            net, inner_lr=0.3, inner_steps=2, first_order=first_order, loss=loss, engine=engine, task_chunk=task_chunk
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = maml(batch)
        check(out.task_loss.detach(), losses)
        check(torch.cat(seen(out.logits), -1).detach(), predictions)
        check(gradient(out, net), gradients)
        assert (out.accuracy is None) == (returns != "tensor")
        again, found = maml.gradients(batch)
        check(found, {f"model.{n}": g for n, g in gradients.items()})
        assert not seen(again.logits)[1].requires_grad
        with torch.inference_mode():
            state = maml.adapt(batch.support_x, batch.support_y)
            check(torch.cat(seen(maml.predict(state, batch.query_x)), -1), predictions)
        check({n: w.clone() for n, w in state[1].items()}, {n: w.detach() for n, w in right.items()})


def test_what_stands_beside_tensors_is_carried_along():
    batch = batches("dict")[0]
    out = MAML(make("dict", "nested"), loss=loss_for("nested"))(batch).logits
    assert out["a"][1:] == [None, 3] and out["b"].cache is None
    assert out["b"].logits.shape == (TASKS,)  # a number for each task
    found = MAML(make("dict", "model output"), loss=loss_for("model output"), engine="loop")(batch).logits
    assert type(found) is ModelOutput and found.logits is found["logits"]


ALGORITHMS = {
    "anil": lambda net, loss: ANIL(net, inner_lr=0.3, inner_steps=2, loss=loss),
    "boil": lambda net, loss: BOIL(net, inner_lr=0.3, inner_steps=2, loss=loss, task_chunk=2),
    "metasgd": lambda net, loss: MetaSGD(net, initial_rates=(0.3, 0.3), inner_steps=2, loss=loss),
    "maml++": lambda net, loss: MAMLPlusPlus(net, inner_lr=0.3, inner_steps=2, multi_step_iterations=0, loss=loss),
    "maml++, all steps": lambda net, loss: MAMLPlusPlus(net, inner_lr=0.3, inner_steps=2, loss=loss),
    "imaml": lambda net, loss: ImplicitMAML(net, inner_lr=0.1, inner_steps=2, loss=loss),
    "reptile": lambda net, loss: Reptile(net, inner_lr=0.3, inner_steps=2, batch_size=3, loss=loss),
    "reptile, serial": lambda net, loss: Reptile(net, inner_steps=2, optimizer="sgd", serial=True, loss=loss),
}


@pytest.mark.parametrize("kind", SOME, ids=" to ".join)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_other_inner_loops_do_what_they_do_with_one_tensor(name, kind):
    batch, take = batches(kind[0])[0], RETURNS[kind[1]][1]
    nets = [make(of=Flat), make(*kind)]
    flat, tree = (
        ALGORITHMS[name](net, loss)
        for net, loss in zip(nets, (F.cross_entropy, lambda p, t: F.cross_entropy(take(p)[0], t)), strict=True)
    )
    torch.manual_seed(3)  # of minibatches
    right = flat(flat_batch())
    torch.manual_seed(3)
    out = tree(batch)
    check(out.task_loss, right.task_loss)
    check(take(out.logits)[0], right.logits)
    check(gradient(out, nets[1]), gradient(right, nets[0]))
    flat.eval(), tree.eval()
    with torch.no_grad():
        right = flat.predict(flat.adapt(*flat_batch()[:2]), flat_batch().query_x)
        check(take(tree.predict(tree.adapt(*batch[:2]), batch.query_x))[0], right)


@pytest.mark.parametrize("given", ["tuple", "dict"])
def test_cavia(given):
    class WithContext(Net):
        def forward(self, *args, **kwargs):
            context = kwargs.pop("context") if kwargs else args[-1]
            x, mask = self.unpack(*args[: -1 if args else None], **kwargs)
            h = torch.tanh(self.first(x * mask + 0.3 * mask))
            return self.pack(self.out(h + context.mean()), h)

    nets = [make(of=Flat), make(given, "dict", of=WithContext)]
    options = {"concatenate": False, "inner_steps": 2, "inner_lr": 0.5}
    right = CAVIA(nets[0], 2, **options)(flat_batch())
    cavia = CAVIA(nets[1], 2, **options, loss=lambda p, t: F.cross_entropy(p["logits"], t))
    batch = batches(given)[0]
    out = cavia(batch)
    check(out.task_loss, right.task_loss)
    check(out.logits["logits"], right.logits)
    check(gradient(out, nets[1]), gradient(right, nets[0]))
    with torch.no_grad():
        check(cavia.predict(cavia.adapt(*batch[:2]), batch.query_x)["hidden"], out.logits["hidden"].detach())
    with pytest.raises(ValueError, match="concatenate=False"):
        CAVIA(nets[1], 2)(batch)


class Base(nn.Module):
    """A network that a condition modulates."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.shift = inner, nn.Linear(10, 5)

    def forward(self, *args, **kwargs):
        condition = kwargs.pop("condition") if kwargs else args[-1]
        return self.inner(*args[: -1 if args else None], **kwargs) + self.shift(condition)


LEARNERS = {
    "protonet": lambda make: ProtoNet(make()),
    "matching": lambda make: MatchingNetwork(make()),
    "head": lambda make: GradientHead(make()),
    "relation": lambda make: RelationNetwork(make(), RelationMLP(5).double()),
    "modulated": lambda make: ModulatedProtoNet(make(), Base(make()).double()),
    "contrastive": lambda make: Contrastive(make(), nn.Linear(5, 3).double()).eval(),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_embedding_learners(name):
    """All tensors are one input, row by row."""
    torch.manual_seed(0)
    flat = LEARNERS[name](lambda: Flat(5).double())
    right = flat(flat_batch())
    for given in ("tuple", "dict", "named tuple"):
        torch.manual_seed(0)
        tree = LEARNERS[name](lambda given=given: Net(given, "tensor", 5).double())
        batch = batches(given)[0]
        out = tree(batch)
        check(out.task_loss, right.task_loss)
        with torch.no_grad():
            right_logits = flat.predict(flat.adapt(*flat_batch()[:2]), flat_batch().query_x)
            check(tree.predict(tree.adapt(*batch[:2]), batch.query_x), right_logits)
    if name == "contrastive":
        batch = batch._replace(query_x=batch.support_x, query_y=batch.support_y)
        both = flat_batch()._replace(query_x=flat_batch().support_x)
        check(tree.train()(batch).loss, flat.train()(both).loss)
        with pytest.raises(ValueError, match="two views"):
            tree(batches(given)[0])


def masked(batch):
    """The same with padding rows in it, as many in two tasks and fewer in the third."""
    support, query = torch.ones(TASKS, SUPPORT, dtype=torch.bool), torch.ones(TASKS, QUERY, dtype=torch.bool)
    support[:2, 4], support[2, 5], query[1, 2:] = False, False, False
    return batch._replace(support_mask=support, query_mask=query)


@pytest.mark.parametrize("name", ["protonet", "matching", "modulated"])
def test_masks_of_embedding_learners(name):
    torch.manual_seed(0)
    right = LEARNERS[name](lambda: Flat(5).double())(masked(flat_batch()))
    torch.manual_seed(0)
    tree = LEARNERS[name](lambda: Net("dict", "tensor", 5).double())
    batch = masked(batches("dict")[0])
    check(tree(batch).task_loss, right.task_loss)
    with torch.no_grad():
        state = tree.adapt(*batch[:2], batch.support_mask)
        check(tree.predict(state, batch.query_x, batch.query_mask), tree.eval()(batch).logits)


@pytest.mark.parametrize("engine", ["layerwise", "lowrank", "vmap", "loop"])
def test_targets_of_several_tensors(engine):
    """Labels and how much each row counts, for an MLP, which has formulas."""
    sx, sm, sy, qx, qm, qy = numbers()
    net = nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, WAYS)).double()

    @dataclass
    class Targets:
        labels: Tensor
        counts: Tensor

    def loss(prediction, target):
        return (F.cross_entropy(prediction, target.labels, reduction="none") * target.counts).mean()

    targets = [(sy, sm[..., 0]), (qy, qm[..., 0])]
    batch = TaskBatch(sx, Targets(*targets[0]), qx, Targets(*targets[1]))
    each = [[Targets(*of) for of in zip(*part, strict=True)] for part in targets]
    right = plain(net, (sx, each[0], qx, each[1]), loss=loss, lr=0.3, steps=2)
    maml = MAML(net, inner_lr=0.3, inner_steps=2, loss=loss, engine=engine)
    for learner in (maml, MAML(net, inner_lr=0.3, inner_steps=2, loss=loss, task_chunk=2)):
        out = learner(batch)
        check(out.task_loss.detach(), right[0])
        check(out.logits.detach(), right[1])
        check(gradient(out, net), right[2])
        assert learner.loss.mappable
    with pytest.raises(ValueError, match=r"support_y: loss 'cross_entropy' takes one tensor, got a Targets \(.labels"):
        MAML(net)(batch)
    with pytest.raises(ValueError, match=r"support_y: loss 'cross_entropy'"):
        MAML(net).gradients(batch)
    with pytest.raises(ValueError, match=r"support_y: loss 'cross_entropy'"):
        CAVIA(net, 2).adapt(*batch[:2])


@pytest.mark.parametrize("engine", ["lowrank", "vmap", "loop"])
def test_one_tensor_in_and_several_out(engine):
    """With low rank too, which takes one tensor only."""
    net, (batch, each), loss = make("tensor", "dataclass"), batches("tensor"), loss_for("dataclass")
    right = plain(net, each, loss=loss, lr=0.3, steps=1, seen=lambda p: p.hidden)
    out = MAML(net, inner_lr=0.3, loss=loss, engine=engine)(batch)
    check(out.logits.hidden.detach(), right[1])
    check(gradient(out, net), right[2])


def test_explain_and_engines_that_take_one_tensor():
    batch = batches("dict")[0]
    maml = MAML(make("dict", "tensor"))
    text = maml.explain(batch)
    assert text.startswith(f"{TASKS} tasks, {SUPPORT} support examples each")
    for engine in ("fused", "lowrank"):
        assert f"{engine}: cannot serve: inputs are several tensors" in text
        with pytest.raises(ValueError, match="inputs are several tensors"):
            MAML(make("dict", "tensor"), engine=engine)(batch)
    assert "vmap: picked" in text


def test_leaves_that_go_wrong_when_mapped_are_seen():
    """The trial compares all of the output, not the loss alone."""
    net = make("tuple", "tuple")
    net.pack = lambda y, h: (y, h + 1 if torch._C._are_functorch_transforms_active() else h)
    batch = batches("tuple")[0]
    with pytest.warns(UserWarning, match="not those of plain autograd"):
        out = MAML(net, loss=lambda p, t: F.cross_entropy(p[0], t))(batch)
    assert out.logits[1].abs().max() < 1
    net = make("tuple", "tuple")
    net.pack = lambda y, h: (y, h + 1 if torch._C._are_functorch_transforms_active() else h)
    maml = MAML(net, loss=lambda p, t: F.cross_entropy(p[0], t), engine="loop")
    state, maml.engine = maml.adapt(*batch[:2]), "auto"
    with pytest.warns(UserWarning, match="not those of plain autograd"):
        assert maml.predict(state, batch.query_x)[1].abs().max() < 1


def test_gradients_through_inputs_and_in_chunks():
    """Inputs that require gradients get them; chunks say that they cannot."""
    batch, (net, loss) = batches("dict")[0], (make("dict", "dict"), loss_for("dict"))
    x = batch.support_x["x"].clone().requires_grad_()
    wants = batch._replace(support_x=batch.support_x | {"x": x})
    found = [
        torch.autograd.grad(MAML(net, loss=loss, engine=engine)(wants).loss, x)[0] for engine in ("vmap", "loop")
    ]
    assert found[0].any()
    check(*found)
    with pytest.raises(ValueError, match="inputs that require gradients"):
        MAML(net, loss=loss, task_chunk=1)(wants)


def test_task_batches_hold_them():
    batch = batches("nested")[0]
    assert batch.num_tasks == TASKS
    moved = batch.to(torch.float16)
    x, (mask, none) = moved.support_x["both"]
    assert x.dtype == mask.dtype == torch.float16 and none is None
    assert isinstance(batches("dict")[0].support_x, Mapping)


def test_layers_that_hand_on_several_tensors_run_in_the_inner_loop():
    """Nothing is split off where one tensor is not all that goes on from a layer to the next."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2 * WIDTH, 6)

        def forward(self, x):
            return {"x": self.layer(x), "y": x.sum(-1, keepdim=True)}

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, WAYS)

        def forward(self, given):
            return self.layer(given["x"].tanh() * given["y"])

    net, batch = nn.Sequential(Encoder(), Head()).double(), flat_batch()
    right = plain(net, batch, lr=0.3, steps=2, adapts=lambda name: name.startswith("1."))
    learner = ANIL(net, inner_lr=0.3, inner_steps=2)
    for _ in range(2):
        out = learner(batch)
        check(out.task_loss.detach(), right[0])
        check(gradient(out, net), right[2])


def test_leading_layers_of_several_tensors_run_in_the_inner_loop():
    """Their batch norms then see one task's rows, as in the rest."""

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(WIDTH, 6), nn.BatchNorm1d(6)

        def forward(self, pair):
            return self.norm(self.layer(pair.x * pair.mask))

    net, (batch, each) = nn.Sequential(First(), nn.Tanh(), nn.Linear(6, WAYS)).double(), batches("named tuple")
    right = plain(net, each, lr=0.3, steps=2, adapts=lambda name: name.startswith("2."))
    out = ANIL(net, inner_lr=0.3, inner_steps=2)(batch)
    check(out.task_loss.detach(), right[0])
    check(gradient(out, net), right[2])
