"""Which engine `auto` takes."""

import gc

import pytest
import torch
from torch import nn

from fastmeta import MAML
from fastmeta.algorithms import ImplicitMAML, MAMLPlusPlus, MetaSGD
from fastmeta.engines import trial
from fastmeta.tasks import TaskBatch

pytestmark = pytest.mark.filterwarnings("ignore:tasks run one after the other:UserWarning")


@pytest.mark.parametrize(("channels", "queries", "mapped"), [(4, 15, True), (64, 75, False)])
def test_convolutions_are_mapped_where_there_is_little_in_a_call(channels, queries, mapped):
    """On a CPU a loop over the tasks is faster for large activations, several times slower for small ones: where there
    is no kernel for them, as in three dimensions."""
    conv = nn.Conv3d(1, channels, (1, 3, 3), padding=(0, 1, 1))
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(channels * 784, 5))
    labels = [torch.zeros(8, rows, dtype=torch.int64) for rows in (5, queries)]
    batch = TaskBatch(torch.randn(8, 5, 1, 1, 28, 28), labels[0], torch.randn(8, queries, 1, 1, 28, 28), labels[1])
    told = MAML(model).explain(batch)
    assert ("loop: picked" in told) is not mapped
    assert ("slower than a loop" in told) is not mapped
    one = TaskBatch(*(part[:1] for part in batch))
    assert "loop: picked" in MAML(model).explain(one)


@pytest.mark.parametrize("make", [MAML, MAMLPlusPlus, ImplicitMAML, MetaSGD], ids=lambda make: make.__name__)
def test_tasks_in_turn_take_the_memory_of_one(make):
    """What one task after the other saves for its backward is gone before the next begins, in every algorithm."""

    class Counted(torch.autograd.Function):
        alive = most = 0

        @staticmethod
        def forward(ctx, x):
            ctx.held = Held()
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return grad

    class Held:
        def __init__(self):
            Counted.alive += 1
            Counted.most = max(Counted.most, Counted.alive)

        def __del__(self):
            Counted.alive -= 1

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.b(Counted.apply(torch.tanh(self.a(x))))

    net, most = Net(), []
    for tasks in (2, 12):
        batch = TaskBatch(*[torch.randn(tasks, 5, 4), torch.zeros(tasks, 5, dtype=torch.int64)] * 2)
        learner = make(net, inner_steps=2)
        learner(batch)
        gc.collect()
        Counted.most = before = Counted.alive
        learner(batch).loss.backward()
        most.append(Counted.most - before)
    assert most[0] == most[1] > 0


def test_a_gradient_that_is_nothing_but_rounding_is_no_reason_for_a_loop():
    """That of a convolution's bias before a batch norm: zero, and in float32 what rounding leaves."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Flatten(),
        nn.Linear(144, 3),
    )  # fmt: skip
    x, y = torch.randn(2, 12, 1, 6, 6), torch.arange(3).repeat(2, 4)
    maml = MAML(model, loss=nn.CrossEntropyLoss(reduction="sum"))
    assert "layerwise: picked" in maml.explain(TaskBatch(x, y, x, y))


class Wrong(nn.Module):
    """One that torch.func gets wrong without a word: it sees another weight."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.norm(self.a(x))
        return self.b(h * 2 if torch._C._are_functorch_transforms_active() else h)


@pytest.mark.parametrize("trusted", [True, False])
def test_rounding_is_told_from_a_wrong_gradient_in_float64(trusted, monkeypatch):
    monkeypatch.setitem(trial._CLOSE, torch.float32, 0.0)  # as where a norm makes much of rounding
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)) if trusted else Wrong()
    batch = TaskBatch(*[torch.randn(2, 5, 4), torch.zeros(2, 5, dtype=torch.int64)] * 2)
    told = MAML(net, inner_steps=2).explain(batch)
    assert ("loop: picked" in told) is not trusted
