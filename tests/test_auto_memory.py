"""`memory="auto"`: without a graph over the steps where that would be large, and with all that one has."""

import gc
import weakref

import numpy as np
import pytest
import torch
from module_kinds import make, plain, tasks
from test_sweep import CLOSE, check, trained
from torch import nn

from fastmeta.algorithms import ANIL, BOIL, MAML, MetaSGD
from fastmeta.engines import _graph_size
from fastmeta.functional import reverse_sweep
from fastmeta.nn import conv4
from fastmeta.tasks import TaskBatch

pytestmark = pytest.mark.filterwarnings("ignore:tasks run one after the other:UserWarning")


@pytest.fixture
def sweeps(monkeypatch):
    """How many inner loops have been swept; all graphs count as large."""
    monkeypatch.setattr(_graph_size, "OF_STEPS", 1)
    monkeypatch.setattr(_graph_size, "LARGE", 1)
    monkeypatch.setattr(_graph_size, "OF_QUERIES", 0)
    count = []
    sweep = reverse_sweep.InnerLoop.sweep
    monkeypatch.setattr(reverse_sweep.InnerLoop, "sweep", lambda *args: count.append(1) or sweep(*args))
    return count


def maml(net, **options):
    return MAML(net, **{"inner_lr": 0.3, "inner_steps": 3} | options)


def one_task(batch):
    return TaskBatch(*(part[:1] for part in batch))


@pytest.mark.parametrize("kind, engine", [("conv, batch norm", "layerwise"), ("conv, batch norm", "loop"),
                                          ("LSTM", "vmap"), ("several heads", "vmap"), ("partly frozen", "loop"),
                                          ("checkpointed", "loop")])  # fmt: skip
def test_all_three_give_the_gradient_of_a_plain_loop(sweeps, kind, engine):
    net, batch = make(kind), TaskBatch(*tasks(kind))
    losses, logits, right = plain(net, batch, lr=0.3, steps=3)
    for memory, swept in (("auto", True), ("graph", False), ("sweep", True)):
        out, found = maml(net, engine=engine, memory=memory).gradients(batch)
        check((out.task_loss, out.logits), (losses, logits))
        check(found, {f"model.{name}": gradient for name, gradient in right.items()})
        assert len(sweeps) == swept * (3 if engine == "loop" else 1)
        sweeps.clear()


@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_more_than_the_gradients_of_the_loss(sweeps, engine):
    """The tasks' losses, logits and second derivatives, with random layers, learned rates and a loss of its own
    parameters."""
    net, batch = make("mlp"), one_task(tasks("mlp"))  # several in turn hand out the loss alone, swept or not
    net.insert(2, nn.Dropout(0.4))
    found = []
    for memory in ("auto", "graph"):
        learner = maml(net, engine=engine, memory=memory, learn_inner_lr=True, weight_decay=0.1)
        wanted = list(trained(learner).values())
        torch.manual_seed(3)
        out = learner(batch)
        drawn = torch.rand(())
        first = torch.autograd.grad(out.loss, wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted, retain_graph=True)
        rest = torch.autograd.grad(out.task_loss.square().sum() + out.logits.sin().sum(), wanted, retain_graph=True)
        found.append((first, second, rest, torch.autograd.grad(2 * out.loss, wanted), drawn))
        assert torch.equal(torch.get_rng_state(), _after(3, drawn_by=learner, batch=batch))
    check(*found)
    assert len(sweeps) == 2  # and one to see the generator's state


def _after(seed, drawn_by, batch):
    torch.manual_seed(seed)
    drawn_by(batch)
    torch.rand(())
    return torch.get_rng_state()


def test_under_autocast_the_graph_comes_back_under_it(sweeps):
    kind = "conv, batch norm"
    net, batch = make(kind).float(), [part.float() if part.is_floating_point() else part for part in tasks(kind)]
    found = []
    for memory in ("auto", "graph"):
        with torch.autocast("cpu"):
            out = maml(net, engine="vmap", memory=memory)(TaskBatch(*batch))
        found.append(torch.autograd.grad(out.task_loss.sum(), net.parameters()))
    assert sweeps
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("cls, options", [(ANIL, {"adapts": lambda name: "bias" in name}), (BOIL, {}),
                                          (MetaSGD, {"initial_rates": (0.1, 0.4)})])  # fmt: skip
def test_other_inner_loops(sweeps, cls, options):
    net, batch = make("LSTM"), TaskBatch(*tasks("LSTM"))
    found = []
    for memory in ("auto", "graph"):
        torch.manual_seed(0)
        learner = cls(net, inner_steps=2, memory=memory, **options)
        out = learner(batch)
        found.append(torch.autograd.grad(out.loss, list(trained(learner).values()), allow_unused=True))
    check(*found)
    assert sweeps


@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_where_a_graph_stays(sweeps, engine):
    net, (sx, sy, qx, qy) = make("LSTM"), tasks("LSTM")
    auto = maml(net, engine=engine)
    x = sx.clone().requires_grad_()
    weights = torch.ones(3, dtype=torch.float64, requires_grad=True)
    torch.autograd.grad(auto(TaskBatch(x, sy, qx, qy)).loss, x)
    torch.autograd.grad(auto(TaskBatch(sx, sy, qx, qy), weights).loss, weights)
    if engine == "vmap":
        torch.func.grad(lambda x: auto(TaskBatch(x, sy, qx, qy)).loss)(sx)
    batch = TaskBatch(sx, sy, qx, qy)
    for options in ({"first_order": True}, {"inner_steps": 1}, {"memory": "graph"}):
        maml(net, engine=engine, **options)(batch).loss.backward()
    with torch.no_grad():
        auto(batch)
    MAML(make("mlp"), inner_steps=3)(TaskBatch(*tasks("mlp"))).loss.backward()  # kernels
    for formulas in ("lowrank", "layerwise"):
        maml(make("mlp"), engine=formulas)(TaskBatch(*tasks("mlp"))).loss.backward()
    net.requires_grad_(False)
    auto(batch)
    assert not sweeps


@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_a_model_that_does_not_do_the_same_twice_keeps_its_graph(sweeps, engine):
    class Noisy(nn.Linear):
        """Draws from a generator that is not torch's."""

        def __init__(self):
            super().__init__(4, 3)
            self.drawn = np.random.default_rng(0)

        def forward(self, x):
            return torch.tanh(super().forward(x)) * float(self.drawn.uniform(0.5, 1.5))

    learner, batch = maml(Noisy().double(), engine=engine), TaskBatch(*tasks("mlp"))
    for _ in range(2):
        out = learner(batch)
        out.loss.backward()
    assert len(sweeps) == 1 and learner.model.weight.grad.abs().max() > 0


class Saved:
    """Bytes that graphs hold: now, and at most."""

    def __init__(self):
        self.now = self.most = 0

    def pack(self, tensor):
        kept, size = _Kept(tensor.detach()), tensor.numel() * tensor.element_size()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(kept, self.gone, size)
        return kept

    def gone(self, size):
        self.now -= size

    def watch(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda kept: kept.tensor)


class _Kept:
    def __init__(self, tensor):
        self.tensor = tensor


def test_large_graphs_are_not_kept(monkeypatch):
    """At the size from which on they count as large, and just below."""
    net = nn.Sequential(conv4(1, 4, track_running_stats=False), nn.Linear(4, 5)).double()
    torch.manual_seed(0)
    batch = TaskBatch(torch.randn(1, 20, 1, 28, 28).double(), torch.randint(5, (1, 20)),
                      torch.randn(1, 2, 1, 28, 28).double(), torch.randint(5, (1, 2)))  # fmt: skip

    def held(**options):
        gc.collect()
        saved = Saved()
        learner = MAML(net, **{"inner_lr": 0.1, "engine": "loop"} | options)
        with saved.watch():
            out = learner(batch)
        after = saved.now
        out.loss.backward()
        return after, saved.most

    forward = Saved()
    with forward.watch():
        kept = net(batch.support_x[0])
    at_most = forward.now  # weights and input too
    del kept
    size = 5 * 20 * _graph_size.of_row(net, batch.support_x)
    assert 0.8 * 5 * at_most < size <= 5 * at_most
    graph, _ = held(inner_steps=5, memory="graph")
    assert graph > 2 * size  # the second derivatives' part
    monkeypatch.setattr(_graph_size, "OF_STEPS", size + 1)
    assert held(inner_steps=5)[0] == graph and "memory" not in MAML(net, inner_steps=5, engine="loop").explain(batch)
    monkeypatch.setattr(_graph_size, "OF_STEPS", size)
    after, most = held(inner_steps=5)
    assert after < 0.1 * graph and most < 0.4 * graph
    assert most < 1.1 * held(inner_steps=10)[1] < 1.2 * most
    assert "memory 'auto': no graph over the steps" in MAML(net, inner_steps=5, engine="loop").explain(batch)
    many = TaskBatch(*batch[:2], batch[2].repeat(1, 50, 1, 1, 1), batch[3].repeat(1, 50))  # which keep as much
    assert "memory" not in MAML(net, inner_steps=5, engine="loop").explain(many)
    assert "memory 'auto'" in MAML(net, inner_steps=6, engine="loop").explain(many)
    (swept, found), (kept, right) = (MAML(net, inner_steps=5, inner_lr=0.1, engine="loop", memory=m).gradients(batch)
                                     for m in ("auto", "graph"))  # fmt: skip
    torch.testing.assert_close((swept.loss, found), (kept.loss, right), **CLOSE)


def test_nothing_of_the_model_shows_that_it_was_looked_at():
    """Buffers, attributes and random numbers stay."""
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 3)).double()
    seen = []
    net[0].register_forward_hook(lambda *_: seen.append(1))
    before, state = {n: b.clone() for n, b in net.named_buffers()}, torch.get_rng_state()
    x = tasks("mlp")[0]
    assert _graph_size.of_row(net, x) > 0
    assert not seen and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())
    assert _graph_size.of_row(nn.Linear(9, 3).double(), x) is None  # which takes other rows
