"""Losses in every algorithm: rows that are ignored, and gradients of what a loss has of its own. Truth is plain
autograd, one task at a time, in float64."""

import functools

import pytest
import torch
from module_kinds import adapted, run
from test_losses import IN, T, check, make_batch, make_module, make_net, meta_gradient
from torch import nn
from torch.nn import functional as F

from fastmeta.algorithms import ANIL, BOIL, CAVIA, MAML, ImplicitMAML, MAMLPlusPlus, MetaSGD, Reptile
from fastmeta.tasks import TaskBatch

# a loss that picks rows by a mask: the engines that map are tried all the same
pytestmark = pytest.mark.filterwarnings("ignore:tasks run one after the other:UserWarning")


# every algorithm -----------------------------------------------------------------------------------------------------

ALGORITHMS = {
    "maml": lambda net, loss, **options: MAML(net, inner_lr=0.3, inner_steps=2, loss=loss, **options),
    "maml-first-order": lambda net, loss, **options: MAML(net, inner_lr=0.3, first_order=True, loss=loss, **options),
    "anil": lambda net, loss, **options: ANIL(net, inner_lr=0.3, inner_steps=2, loss=loss, **options),
    "boil": lambda net, loss, **options: BOIL(net, inner_lr=0.3, inner_steps=2, loss=loss, **options),
    "metasgd": lambda net, loss, **options: MetaSGD(
        net, initial_rates=(0.3, 0.3), inner_steps=2, loss=loss, **options
    ),
    "maml++": lambda net, loss, **options: MAMLPlusPlus(
        net, inner_lr=0.3, inner_steps=2, adapt_norms=True, multi_step_iterations=1, loss=loss, **options
    ),
    "cavia": lambda net, loss, **options: CAVIA(net, 2, inner_lr=0.5, inner_steps=2, loss=loss, **options),
    "imaml": lambda net, loss: ImplicitMAML(
        net, regularization=20.0, inner_lr=0.04, inner_steps=30, cg_steps=20, loss=loss
    ),
    "reptile": lambda net, loss: Reptile(net, inner_lr=0.3, inner_steps=3, batch_size=None, loss=loss),
}


def narrowed(batch, name):
    """Without the inputs in whose place the context stands."""
    if name != "cavia":
        return batch
    return TaskBatch(batch[0][..., : IN - 2], batch[1], batch[2][..., : IN - 2], batch[3])


@pytest.mark.parametrize("make", [make_net, make_module], ids=["mlp", "module"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_ignored_rows_are_as_rows_that_are_not_there(name, make):
    short = narrowed(make_batch(), name)
    more = narrowed(make_batch(seed=1), name)
    labels = torch.full((T, 2), -100)
    parts = [torch.cat([part, other[:, :2]], 1) for part, other in zip(short, more, strict=True)]
    parts[1][:, -2:] = parts[3][:, -2:] = labels
    right, gradients = meta_gradient(ALGORITHMS[name](make(), "cross_entropy"), short)
    output, found = meta_gradient(ALGORITHMS[name](make(), nn.CrossEntropyLoss()), TaskBatch(*parts))
    check(output.task_loss.detach(), right.task_loss.detach())
    check(output.accuracy, right.accuracy)
    check(found, gradients)


class Tempered(nn.Module):
    """A loss with parameters, one of them frozen, that need not vanish with the weights' gradient."""

    def __init__(self):
        super().__init__()
        self.log_t = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
        self.of_classes = nn.Parameter(torch.tensor([0.1, -0.3, 0.4], dtype=torch.float64))
        self.frozen = nn.Parameter(torch.tensor(0.7, dtype=torch.float64), requires_grad=False)

    def forward(self, prediction, target):
        scaled = prediction * self.log_t.exp() + self.of_classes
        return F.cross_entropy(scaled, target) + self.frozen * (self.of_classes.exp() * prediction.square()).mean()


class Selecting(Tempered):
    """One that cannot be mapped over tasks."""

    def forward(self, prediction, target):
        keep = target != 2
        return super().forward(prediction[keep], target[keep])


def losses_by_plain_autograd(name, net, batch, loss):
    """The tasks' losses, with a graph to everything."""
    tasks = list(zip(*batch, strict=True))
    if name == "cavia":
        weights, losses = dict(net.named_parameters()), []

        def with_context(context, x):
            return run(net, weights, torch.cat([x, context.expand(len(x), -1)], 1))

        for sx, sy, qx, qy in tasks:
            context = torch.zeros(2, dtype=torch.float64, requires_grad=True)
            for _ in range(2):
                value = loss(with_context(context, sx), sy)
                context = context - 0.5 * torch.autograd.grad(value, context, create_graph=True)[0]
            losses.append(loss(with_context(context, qx), qy))
        return torch.stack(losses)
    if name == "imaml":
        losses = []
        for sx, sy, qx, qy in tasks:
            slow = dict(net.named_parameters())
            fast = dict(slow)
            for _ in range(30):
                found = torch.autograd.grad(loss(run(net, fast, sx), sy), list(fast.values()), create_graph=True)
                fast = {n: w - 0.04 * (g + 20.0 * (w - slow[n])) for (n, w), g in zip(fast.items(), found, strict=True)}
            losses.append(loss(run(net, fast, qx), qy))
        return torch.stack(losses)
    last = [n for n, _ in net.named_parameters()][-1].rpartition(".")[0]
    adapts = {"anil": lambda n: n.startswith(last), "boil": lambda n: not n.startswith(last)}.get(name, lambda n: True)
    options = {"lr": 0.3, "loss": loss, "adapts": adapts, "first_order": name == "maml-first-order"}

    def query_loss(task, steps):
        sx, sy, qx, qy = task
        return loss(run(net, adapted(net, sx, sy, steps=steps, **options), qx), qy)

    if name == "maml++":  # each step has half of the loss
        return torch.stack([(query_loss(task, 1) + query_loss(task, 2)) / 2 for task in tasks])
    return torch.stack([query_loss(task, 1 if name == "maml-first-order" else 2) for task in tasks])


@pytest.mark.parametrize("make", [make_net, make_module], ids=["mlp", "module"])
@pytest.mark.parametrize("make_loss", [Tempered, Selecting])
@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "reptile"])
def test_gradients_of_a_losss_parameters(name, make_loss, make):
    batch, net, loss = narrowed(make_batch(), name), make(), make_loss()
    task_weights = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
    truth = (task_weights * losses_by_plain_autograd(name, net, batch, loss)).mean()
    wanted = [p for p in (*loss.parameters(), *net.parameters()) if p.requires_grad]
    right = torch.autograd.grad(truth, wanted)
    for options in ({},) if name == "imaml" else ({}, {"task_chunk": 2}):
        learner = ALGORITHMS[name](net, loss, **options)
        found = torch.autograd.grad(learner(batch, task_weights).loss, wanted)
        check(found, right)
        assert {"loss_module.log_t", "loss_module.frozen"} <= learner.state_dict().keys()


@pytest.mark.parametrize("engine", ["lowrank", "layerwise", "vmap", "loop"])
def test_gradients_of_a_losss_parameters_in_every_engine(engine):
    batch, net, loss = make_batch(), make_net(), Tempered()
    wanted = [p for p in (*loss.parameters(), *net.parameters()) if p.requires_grad]
    right = torch.autograd.grad(losses_by_plain_autograd("maml", net, batch, loss).mean(), wanted)
    learner = ALGORITHMS["maml"](net, loss, engine=engine)
    check(torch.autograd.grad(learner(batch).loss, wanted), right)
    found = learner.gradients(batch)[1]
    check([found[name] for name in ("loss_module.log_t", "loss_module.of_classes")], list(right[:2]))


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "reptile"])
def test_gradients_of_what_a_function_captures(name):
    """In a closure, a default, a partial, an object: as if autograd had walked there by itself."""
    module, batch, net = Tempered(), narrowed(make_batch(), name), make_module()
    log_t, of_classes = (p.detach().clone().requires_grad_() for p in (module.log_t, module.of_classes))
    start = log_t * 1.0  # no leaf: the gradient goes on

    def captures(prediction, target, of_classes=of_classes):
        weights = {"log_t": start, "of_classes": of_classes, "frozen": module.frozen}
        return torch.func.functional_call(module, weights, (prediction, target))

    class Held:
        def __init__(self):
            self.inside = {"of": [functools.partial(captures)]}

        def __call__(self, prediction, target):
            return self.inside["of"][0](prediction, target)

    module.requires_grad_(False)
    wanted = [log_t, of_classes, *net.parameters()]
    right = torch.autograd.grad(losses_by_plain_autograd(name, net, batch, captures).mean(), wanted, retain_graph=True)
    for loss in (captures, Held()):
        for options in ({},) if name == "imaml" else ({}, {"task_chunk": 2}):
            learner = ALGORITHMS[name](net, loss, **options)
            check(torch.autograd.grad(learner(batch).loss, wanted, retain_graph=True), right)


def test_reptile_has_no_gradient_for_a_loss():
    loss = Tempered()
    with pytest.raises(ValueError, match="loss has parameters or captures tensors that require gradients"):
        Reptile(make_net(), loss=loss)
    learner = Reptile(make_net(), loss=loss.requires_grad_(False))
    learner(make_batch()).loss.backward()
    loss.requires_grad_(True)
    with pytest.raises(ValueError, match="freeze them"):
        learner(make_batch())
