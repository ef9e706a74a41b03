"""Whatever plain PyTorch can differentiate gives the answer of plain autograd, one task at a time."""

import pytest
import torch
from module_kinds import KINDS, adapted, implicit, make, plain, tasks, with_context
from torch.utils.checkpoint import checkpoint

from fastmeta.algorithms import ANIL, CAVIA, MAML, ImplicitMAML, MAMLPlusPlus, MetaSGD, Reptile
from fastmeta.tasks import TaskBatch

CLOSE = {"rtol": 1e-7, "atol": 1e-9}
pytestmark = [
    pytest.mark.filterwarnings("ignore:tasks run one after the other:UserWarning"),
    # vmap takes weight_norm task by task and says that this is slow: here the gradient counts
    pytest.mark.filterwarnings("ignore:There is a performance drop.*aten.._weight_norm:UserWarning"),
]


def check(found, right):
    torch.testing.assert_close(found, right, **CLOSE)


@pytest.mark.parametrize("first_order", [False, True], ids=["second order", "first order"])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_maml(kind, steps, first_order):
    batch, options = TaskBatch(*tasks(kind)), {"steps": steps, "first_order": first_order, "lr": 0.3}
    for training in (True, False):
        net = make(kind).train(training)
        maml = MAML(net, inner_lr=0.3, inner_steps=steps, first_order=first_order)
        losses, predictions, gradients = plain(net, batch, **options)
        out = maml(batch)
        check(out.task_loss.detach(), losses)
        check(out.logits.detach(), predictions)
        named = {n: p for n, p in net.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(out.loss, list(named.values()), allow_unused=True, materialize_grads=True)
        check(dict(zip(named, found, strict=True)), gradients)
        check(maml.gradients(batch)[1], {f"model.{n}": g for n, g in gradients.items()})
        with torch.no_grad():
            state = maml.adapt(batch.support_x, batch.support_y)
            check(maml.predict(state, batch.query_x), predictions)
        right = adapted(net, batch.support_x[1], batch.support_y[1], **options)
        check({n: w.detach() for n, w in state[1].items()}, {n: w.detach() for n, w in right.items()})


def last_layer(net):
    """Whether a parameter is of the layer with the last one that is trained."""
    last = [name for name, p in net.named_parameters() if p.requires_grad][-1].rpartition(".")[0]
    return lambda name: name.rpartition(".")[0] == last


ALGORITHMS = {
    "anil": lambda net, **o: ANIL(net, adapts=last_layer(net), inner_lr=0.3, **o),
    "metasgd": lambda net, first_order, **o: _in_order(MetaSGD(net, initial_rates=(0.3, 0.3), **o), first_order),
    "maml++": lambda net, inner_steps, **o: _of_steps(
        MAMLPlusPlus(
            net, inner_lr=0.3, inner_steps=3, multi_step_iterations=0, batch_norm_per_step=False, adapt_norms=True, **o
        ),
        inner_steps,
    ),
}


def _in_order(learner, first_order):
    learner.first_order = first_order
    return learner


def _of_steps(learner, steps):
    learner.inner_steps = steps
    return learner


def gradients_of(net, loss):
    named = {n: p for n, p in net.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_other_inner_loops(name, kind):
    net, batch = make(kind), TaskBatch(*tasks(kind))
    adapts = last_layer(net) if name == "anil" else lambda _: True
    for training, steps, first_order in [(True, 1, False), (False, 3, False), (True, 3, True), (False, 0, False)]:
        net.train(training)
        learner = ALGORITHMS[name](net, inner_steps=steps, first_order=first_order)
        losses, right, gradients = plain(net, batch, lr=0.3, steps=steps, first_order=first_order, adapts=adapts)
        out = learner.train(training)(batch)
        check(out.task_loss.detach(), losses)
        check(gradients_of(net, out.loss), gradients)
        with torch.no_grad():
            check(learner.predict(learner.adapt(batch.support_x, batch.support_y), batch.query_x), right)


@pytest.mark.parametrize("kind", KINDS)
def test_reptile(kind):
    net, batch = make(kind), TaskBatch(*tasks(kind))
    x, y = torch.cat([batch.support_x, batch.query_x], 1), torch.cat([batch.support_y, batch.query_y], 1)
    for steps in (0, 1, 3):
        out = Reptile(net, inner_lr=0.3, inner_steps=steps, optimizer="sgd", batch_size=None)(batch)
        each = [adapted(net, *task, lr=0.3, steps=steps, first_order=True) for task in zip(x, y, strict=True)]
        named = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
        check(
            gradients_of(net, out.loss),
            {n: p.detach() - torch.stack([w[n] for w in each]).mean(0).detach() for n, p in named},
        )


@pytest.mark.parametrize("kind", KINDS)
def test_implicit_maml(kind):
    """The inner descent and the conjugate gradients, one task at a time."""
    net, batch = make(kind), TaskBatch(*tasks(kind))
    for training, steps in [(True, 0), (True, 3), (False, 1)]:
        net.train(training)
        learner = ImplicitMAML(net, inner_lr=0.1, inner_steps=steps, cg_steps=4).train(training)
        out = learner(batch)
        losses, gradients = implicit(net, batch, lr=0.1, steps=steps, regularization=2.0, cg_steps=4)
        check(out.task_loss.detach(), losses)
        check(gradients_of(net, out.loss), gradients)
        with torch.no_grad():
            predictions = learner.predict(learner.adapt(batch.support_x, batch.support_y), batch.query_x)
        check(predictions, out.logits.detach())


@pytest.mark.parametrize("kind", [kind for kind, (_, shape) in KINDS.items() if shape == (4,)])
def test_cavia(kind):
    """Two numbers of the four are the context's."""
    net = make(kind)
    batch = TaskBatch(*(part[..., :2] if part.is_floating_point() else part for part in tasks(kind)))
    out = CAVIA(net, 2, inner_lr=0.5, inner_steps=2)(batch)
    named = {n: p for n, p in net.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(out.loss, list(named.values()), allow_unused=True, materialize_grads=True)
    losses, gradients = with_context(net, batch, lr=0.5, steps=2)
    check(out.task_loss.detach(), losses)
    check(dict(zip(named, found, strict=True)), gradients)


def test_what_hooks_keep_are_tensors_of_one_task():
    """Neither explaining nor running hands a hook torch.func's wrappers."""
    net, batch = make("hooks"), TaskBatch(*tasks("hooks"))
    maml = MAML(net, inner_lr=0.3)
    assert "has hooks" in maml.explain(batch) and not net.kept
    maml(batch)
    assert len(net.kept) == 2 * len(batch.support_x) and torch.cat(net.kept).isfinite().all()


class _Reentrant(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.out = torch.nn.Linear(4, 4), torch.nn.Linear(6, 3)
        self.block = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm(6))

    def forward(self, x):
        return self.out(checkpoint(self.block, torch.tanh(self.first(x)), use_reentrant=True))


# what cannot be right, and the sentence that refuses it
REFUSED = {
    "batch norm in eval mode, never trained": (
        lambda: torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3)).eval(),
        "running statistics have never been updated",
    ),
    "reentrant checkpoint": (_Reentrant, "use_reentrant=False"),
    "compiled by TorchScript": (
        lambda: torch.jit.trace(torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 3)), torch.zeros(2, 4)),
        "Jitted modules",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind):
    make_net, message = REFUSED[kind]
    batch = TaskBatch(*(part.float() if part.is_floating_point() else part for part in tasks("mlp")))
    for make_learner in (MAML, lambda net: ANIL(net, adapts=lambda name: True), MetaSGD, ImplicitMAML):
        with pytest.raises((ValueError, RuntimeError), match=message):
            make_learner(make_net())(batch)
