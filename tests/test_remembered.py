"""What is remembered about a module holds only while it is certain to, and nobody else notices that it is looked at."""

import copy
import io
import threading

import pytest
import torch
from module_kinds import make, plain, tasks
from torch import nn
from torch.nn import functional as F

from fastmeta.algorithms import MAML, ImplicitMAML
from fastmeta.engines.inspect import MLPSpec, mlp_spec
from fastmeta.tasks import TaskBatch


def check(found, right):
    torch.testing.assert_close(found, right, rtol=1e-7, atol=1e-9)


def test_a_head_chosen_by_an_attribute():
    net, batch = make("several heads"), TaskBatch(*tasks("several heads"))
    maml = MAML(net, inner_lr=0.3)
    for use in (0, 1, 0):
        net.use = use
        right = {f"model.{n}": g for n, g in plain(net, batch, lr=0.3, steps=1)[2].items()}
        check(maml.gradients(batch)[1], right)
        assert right[f"model.heads.{use}.weight"].any() and not right[f"model.heads.{1 - use}.weight"].any()


def test_settings_of_plain_layers_may_change():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3))
    assert isinstance(mlp_spec(net), MLPSpec)
    net[2].approximate = "tanh"
    assert isinstance(mlp_spec(net), str)
    net[2].approximate = "none"
    net[1].weight = nn.Parameter(torch.randn(6, 5))
    assert mlp_spec(net).in_features == 5


def test_a_forward_that_keeps_what_it_sees_keeps_tensors():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.Linear(4, 3), None

        def forward(self, x):
            self.last = self.layer(x)
            return self.last

    net = Keeps()
    assert "writes into 'last'" in mlp_spec(net) and net.last is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda learner: reloaded(learner)], ids=["copied", "pickled"])
def test_copies_have_plans_of_their_own(copied):
    batch = TaskBatch(*tasks("mlp"))
    maml = MAML(make("mlp"), inner_lr=0.3)
    maml.gradients(batch)
    other = copied(maml)
    assert other._direct is None
    with torch.no_grad():
        for p in other.model.parameters():
            p.mul_(0.5)
    del maml
    right = {f"model.{n}": g for n, g in plain(other.model, batch, lr=0.3, steps=1)[2].items()}
    check(other.gradients(batch)[1], right)


def reloaded(learner):
    file = io.BytesIO()
    torch.save(learner, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_other_threads_notice_nothing():
    """Learners on hand-written modules are made and run in two threads, beside a plain net in a third."""
    batch, failures, done = TaskBatch(*tasks("several heads")), [], threading.Event()
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()

    def guarded(run):
        try:
            run()
        except Exception as error:
            failures.append(error)

    def bystander():
        while not done.is_set():
            net(batch.support_x[0])

    def learners():
        for seed in range(20):
            MAML(make("several heads", seed), inner_lr=0.3).gradients(batch)

    watching = threading.Thread(target=guarded, args=(bystander,))
    working = [threading.Thread(target=guarded, args=(learners,)) for _ in range(2)]
    for thread in (watching, *working):
        thread.start()
    for thread in working:
        thread.join()
    done.set()
    watching.join()
    assert not failures


class Scaled(nn.Module):
    """A loss with a parameter that is to be learned."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, prediction, target):
        return F.cross_entropy(prediction * self.log_scale.exp(), target)


@pytest.mark.parametrize("options", [{}, {"task_chunk": 2}, {"engine": "loop"}], ids=["at once", "chunks", "loop"])
def test_a_losss_parameters_are_the_learners(options):
    loss, batch, net = Scaled(), TaskBatch(*tasks("mlp")), make("mlp")
    maml = MAML(net, inner_lr=0.3, loss=loss, **options)
    losses = []
    for sx, sy, qx, qy in zip(*batch, strict=True):
        weights = dict(net.named_parameters())
        value = loss(torch.func.functional_call(net, weights, (sx,)), sy)
        found = torch.autograd.grad(value, list(weights.values()), create_graph=True)
        fast = {n: w - 0.3 * g for (n, w), g in zip(weights.items(), found, strict=True)}
        losses.append(loss(torch.func.functional_call(net, fast, (qx,)), qy))
    (right,) = torch.autograd.grad(torch.stack(losses).mean(), loss.log_scale)
    check(maml.gradients(batch)[1]["loss_module.log_scale"], right)
    assert "loss_module.log_scale" in maml.state_dict()


def test_losses_that_cannot_be_mapped():
    """One-hot targets made in the loss, and rows picked by a mask of the data."""

    def masked(prediction, target):
        keep = target != 2
        return F.mse_loss(prediction.softmax(-1)[keep], F.one_hot(target, 3).to(prediction.dtype)[keep])

    net, batch = make("mlp"), TaskBatch(*tasks("mlp"))
    maml = MAML(net, inner_lr=0.3, inner_steps=2, loss=masked)
    _, _, right = plain(net, batch, lr=0.3, steps=2, loss=masked)
    check(maml.gradients(batch)[1], {f"model.{n}": g for n, g in right.items()})
    assert ImplicitMAML(net, loss=masked)(batch).loss.isfinite()
