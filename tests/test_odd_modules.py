"""Modules that plain PyTorch can differentiate and that are easily got wrong: parts without gradients, layers held in
two places, complex numbers, sparse gradients, parameters that are one number or of several dtypes."""

import copy
from functools import partial

import pytest
import torch
from module_kinds import implicit, make, plain, tasks
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from fastmeta.algorithms import ANIL, CAVIA, MAML, ConditionalCAML, ImplicitMAML, MAMLPlusPlus, MetaSGD
from fastmeta.functional import functional_call
from fastmeta.tasks import TaskBatch

CLOSE = {"rtol": 1e-7, "atol": 1e-9}
pytestmark = [
    pytest.mark.filterwarnings("ignore:tasks run one after the other:UserWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop.*embedding_bag:UserWarning"),
]


def check(found, right):
    torch.testing.assert_close(found, right, **CLOSE)


class Partly(nn.Module):
    """Its first layer runs without gradients, which leaves no trace in a graph of what it does."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        with torch.no_grad():
            hidden = torch.tanh(self.body(x))
        return self.head(hidden)


class Autocast(Partly):
    """Its first layer computes in bfloat16."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.head(torch.tanh(self.body(x)))


class Used(nn.Module):
    """One layer, used twice."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.out = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.norm(self.layer(torch.tanh(self.layer(x)))))


class Held(nn.Module):
    """The same, with the layer in two places."""

    def __init__(self, used):
        super().__init__()
        self.first, self.second = nn.Sequential(used.layer, nn.Tanh()), nn.Sequential(used.layer, used.norm)
        self.out = used.out

    def forward(self, x):
        return self.out(self.second(self.first(x)))


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5, dtype=torch.complex128))
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        return self.out((x.to(self.weight.dtype) @ self.weight).abs())

    def double(self):
        self.out.double()
        return self


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.tensor(0.3)), nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x) * self.scale.exp()


class Text(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embed, self.out = nn.Embedding(11, 6, **options), nn.Linear(6, 3)

    def forward(self, ids):
        return self.out(torch.tanh(self.embed(ids)).mean(1))


class TwoTypes(Partly):
    def forward(self, x):
        return self.head(torch.tanh(self.body(x.float())).double())

    def double(self):
        self.head.double()
        return self


KINDS = {
    "no gradients in a part": Partly,
    "complex": Complex,
    "a parameter of one number": Scaled,
    "text, sparse gradients": lambda: Text(sparse=True),
    "text, gradients by frequency": lambda: Text(scale_grad_by_freq=True),
    "two dtypes": TwoTypes,
}


def given(kind):
    torch.manual_seed(0)
    batch = TaskBatch(*tasks("text, embeddings" if "text" in kind else "mlp"))
    return KINDS[kind]().double(), batch


def gradients_of(net, loss):
    named = {n: p for n, p in net.named_parameters()}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_maml_and_implicit_maml(kind):
    net, batch = given(kind)
    close = {"rtol": 1e-4, "atol": 1e-6} if kind == "two dtypes" else CLOSE  # float32 in it
    losses, predictions, gradients = plain(copy.deepcopy(net), batch, lr=0.3, steps=2, seen=lambda p: p)
    for engine in ("auto", "loop"):
        maml = MAML(net, inner_lr=0.3, inner_steps=2, engine=engine)
        out = maml(batch)
        torch.testing.assert_close((out.task_loss.detach(), out.logits.detach()), (losses, predictions), **close)
        found = gradients_of(net, out.loss)
        torch.testing.assert_close({n: g.to_dense() for n, g in found.items()},
                                   {n: g.to_dense() for n, g in gradients.items()}, **close)  # fmt: skip
    if kind in ("a parameter of one number", "no gradients in a part"):
        losses, gradients = implicit(net, batch, lr=0.1, steps=2, regularization=2.0, cg_steps=3)
        out = ImplicitMAML(net, inner_lr=0.1, inner_steps=2, cg_steps=3)(batch)
        check(out.task_loss, losses)
        check(gradients_of(net, out.loss), gradients)


def test_a_part_under_autocast_of_its_own_is_no_chain_of_formulas():
    net, batch = Autocast(), TaskBatch(*(t.float() if t.is_floating_point() else t for t in tasks("mlp")))
    maml = MAML(net, inner_steps=0)
    assert "autocast of its own" in maml.explain(batch)
    assert maml(batch).logits.dtype == torch.bfloat16


LEARNERS = {
    "maml": lambda net: MAML(net, inner_lr=0.3, inner_steps=2),
    "maml, vmap": lambda net: MAML(net, inner_lr=0.3, inner_steps=2, engine="vmap"),
    "maml, loop, decay": lambda net: MAML(net, inner_lr=0.3, inner_steps=2, engine="loop", weight_decay=0.1),
    "meta-sgd": lambda net: MetaSGD(net, initial_rates=(0.3, 0.3), inner_steps=2),
    "maml++": lambda net: MAMLPlusPlus(net, inner_lr=0.3, inner_steps=2, multi_step_iterations=0, adapt_norms=True),
    "anil": lambda net: ANIL(net, inner_lr=0.3, inner_steps=2),
    "implicit": lambda net: ImplicitMAML(net, inner_lr=0.3, inner_steps=2),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_a_layer_held_in_two_places_is_one_that_is_used_twice(name):
    torch.manual_seed(0)
    used, batch = Used().double(), TaskBatch(*tasks("mlp"))
    held, own = Held(used), list(used.parameters())
    outputs = []
    for net in (used, held):
        learner = LEARNERS[name](net)
        out = learner(batch)
        outputs.append((out.task_loss, torch.autograd.grad(out.loss, own)))
        learner.predict(learner.adapt(batch.support_x, batch.support_y), batch.query_x)
    check(*outputs)
    assert list(held.parameters()) == [held.first[0].weight, held.first[0].bias, *own[2:]]
    assert all(p is right for p, right in zip(held.parameters(), own, strict=True))
    functional_call(held, {n: p.detach() * 2 for n, p in held.named_parameters()}, batch.support_x[0])
    assert all(p is right for p, right in zip(held.parameters(), own, strict=True))


def test_rates_and_norms_of_complex_parameters_are_real():
    net, batch = given("complex")
    right = copy.deepcopy(net)
    optimizer = torch.optim.SGD(right.parameters(), lr=0.3, weight_decay=0.1)
    F.cross_entropy(right(batch.support_x[0]), batch.support_y[0]).backward()
    clip_grad_norm_(right.parameters(), 0.2)
    optimizer.step()
    for rate in (0.3, torch.tensor(0.3), {"": 0.3}):
        for learner in (MAML, ANIL):
            options = {"adapts": lambda _: True} if learner is ANIL else {}
            learner = learner(net, inner_lr=rate, inner_steps=1, clip_norm=0.2, weight_decay=0.1, **options)
            state = learner.adapt(batch.support_x, batch.support_y)
            torch.testing.assert_close(state[0], dict(right.named_parameters()), rtol=1e-6, atol=1e-8)
    assert not any(rate.is_complex() for rate in MAMLPlusPlus(net).rates.values())


class Shifted(nn.Module):
    """A module beside which something is: a CAVIA's context, or the condition of a CAML."""

    def __init__(self, inside, size):
        super().__init__()
        self.inside, self.shift = inside, nn.Linear(size, 3).double()

    def forward(self, x, beside):
        return self.inside(x) * torch.tanh(self.shift(beside))


def test_what_does_not_adapt_need_not_be_differentiable_twice():
    """An embedding bag has no second derivative, which is asked for only where it adapts."""
    torch.manual_seed(0)
    bag, batch = nn.EmbeddingBag(11, 3).double(), TaskBatch(*tasks("text, embeddings"))
    out = CAVIA(Shifted(bag, 2), 2, concatenate=False, inner_steps=2)(batch)
    out.loss.backward()
    assert bag.weight.grad.abs().max() > 0
    bag.zero_grad()
    encoder = nn.Sequential(nn.EmbeddingBag(11, 4)).double()
    caml = ConditionalCAML(encoder, Shifted(bag, 4), adapts=lambda name: name.startswith("shift"))
    caml(batch).loss.backward()
    assert bag.weight.grad.abs().max() > 0


def test_a_loss_returns_one_number_of_a_task():
    net, batch = make("mlp"), TaskBatch(*tasks("mlp"))
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    right = MAML(net, loss=nn.CrossEntropyLoss())(batch, weights)

    def of_one(prediction, target):
        return F.cross_entropy(prediction, target).view(1)

    for engine in ("vmap", "loop", "auto"):
        found = MAML(net, loss=of_one, engine=engine)(batch, weights)
        check((found.loss, found.task_loss), (right.loss, right.task_loss))
    for steps in (0, 1):
        with pytest.raises(ValueError, match=r"one number for each task, got shape \[4\]|got shape \[6\]"):
            MAML(net, inner_steps=steps, loss=lambda p, t: F.cross_entropy(p, t, reduction="none"))(batch)
        with pytest.raises(TypeError, match="must return a tensor for each task, got float"):
            MAML(net, inner_steps=steps, loss=lambda p, t: 1.0)(batch)


def test_what_depends_on_no_parameter():
    """Nothing to learn, and nothing to fail at."""

    class View(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))

        def forward(self, x):
            return x[..., :3]

    net, batch = View(), TaskBatch(*tasks("mlp"))
    assert not MAML(net).gradients(batch)[1]["model.unused"].any()
    ImplicitMAML(net)(batch).loss.backward()
    assert not net.unused.grad.any()


def test_losses_that_are_no_numbers():
    net, batch = given("complex")
    assert MAML(net, loss=lambda p, t: p.sum() * torch.nan)(batch).task_loss.isnan().all()


def test_a_loss_that_is_mapped_only_while_its_gradient_is_taken():
    """torch refuses to map this one by itself, but not its gradient; implicit MAML takes the gradient outside."""
    torch.manual_seed(0)
    net, batch = Used().double(), TaskBatch(*tasks("mlp"))
    options = {"weight": torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64), "label_smoothing": 0.1}
    found, right = (
        gradients_of(net, ImplicitMAML(net, inner_steps=2, loss=loss)(batch).loss)
        for loss in (partial(F.cross_entropy, **options), nn.CrossEntropyLoss(**options))
    )
    check(found, right)
