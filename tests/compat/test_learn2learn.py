"""learn2learn's learners and what clones and updates modules, against the same steps by hand in float64."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import fastmeta
from fastmeta.compat import learn2learn as l2l

LR, STEPS = 0.3, 2


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.lstm(torch.stack([x, x.flip(-1)], 1))[0][:, -1])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.into, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layer(self.into(x).unsqueeze(0))[0])


def mlp():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def convolutional():
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
    )


MODELS = {"mlp": mlp, "conv": convolutional, "lstm": Recurrent, "tied": Tied, "transformer": Attending}


def task(rows=6):
    return torch.randn(rows, 5, dtype=torch.float64), torch.arange(rows) % 3


def loss_of(model, weights, rows):
    x, y = rows
    # a tied weight has one name in named_parameters: both places take what it becomes
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F.cross_entropy(functional_call(model, weights, (x,), tie_weights=True), y)


def by_hand(model, support, query, rates, first_order):
    """Query loss and meta-gradients by name; `rates` a number or tensors by name, which get gradients too."""
    slow = dict(model.named_parameters())
    weights = slow
    for _ in range(STEPS):
        found = torch.autograd.grad(
            loss_of(model, weights, support), list(weights.values()), create_graph=not first_order, retain_graph=True
        )
        step = rates if isinstance(rates, dict) else dict.fromkeys(slow, rates)
        weights = {n: w - step[n] * g for (n, w), g in zip(weights.items(), found, strict=True)}
    loss = loss_of(model, weights, query)
    wanted = list(slow.values()) + (list(rates.values()) if isinstance(rates, dict) else [])
    return loss, torch.autograd.grad(loss, wanted)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-12)


def looped(learner, support, query):
    clone = learner.clone()
    for _ in range(STEPS):
        clone.adapt(F.cross_entropy(clone(support[0]), support[1]))
    return F.cross_entropy(clone(query[0]), query[1])


# learners -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("first_order", [False, True])
def test_maml(kind, first_order):
    model, support, query = MODELS[kind]().double(), task(), task(7)
    expected, gradients = by_hand(copy.deepcopy(model), support, query, LR, first_order)
    fused = torch.backends.cuda.flash_sdp_enabled()
    learner = l2l.algorithms.MAML(model, lr=LR, first_order=first_order)
    loss = looped(learner, support, query)
    loss.backward()
    assert_same([loss, *(p.grad for p in model.parameters())], [expected, *gradients])
    assert torch.backends.cuda.flash_sdp_enabled() == fused, "the switch is put back"


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "lstm", "tied"])
def test_meta_sgd(kind, first_order):
    model, support, query = MODELS[kind]().double(), task(), task(7)
    learner = l2l.algorithms.MetaSGD(model, lr=LR, first_order=first_order)
    with torch.no_grad():
        for rate in learner.lrs:
            rate.mul_(torch.rand_like(rate))
    names = [n for n, _ in model.named_parameters()]
    rates = {n: r.detach().clone().requires_grad_() for n, r in zip(names, learner.lrs, strict=True)}
    expected, gradients = by_hand(copy.deepcopy(model), support, query, rates, first_order)
    loss = looped(learner, support, query)
    loss.backward()
    assert sum(p.numel() for p in learner.parameters()) == 2 * sum(p.numel() for p in model.parameters())
    found = [p.grad for p in model.parameters()] + [rate.grad for rate in learner.lrs]
    assert_same([loss, *found], [expected, *gradients])


@pytest.mark.parametrize("adapt_transform", [False, True])
@pytest.mark.parametrize("first_order", [False, True])
def test_gbml(adapt_transform, first_order):
    model, support, query = nn.Linear(5, 3).double(), task(), task(7)
    learner = l2l.algorithms.GBML(
        model, l2l.optim.MetaCurvatureTransform, lr=LR, adapt_transform=adapt_transform, first_order=first_order
    )
    with torch.no_grad():
        for p in learner.compute_update.parameters():
            p.add_(0.1 * torch.randn_like(p))
    slow = [model.weight, model.bias, *learner.compute_update.parameters()]
    w, b, left, right, mc = slow
    for step in range(STEPS):
        loss = F.cross_entropy(support[0] @ w.t() + b, support[1])
        graph = {"create_graph": not first_order, "retain_graph": True}
        if adapt_transform and step:
            found = torch.autograd.grad(loss, (left, right, mc), **graph)
            left, right, mc = (p - LR * g for p, g in zip((left, right, mc), found, strict=True))
        d_w, d_b = torch.autograd.grad(loss, (w, b), create_graph=not first_order or adapt_transform, retain_graph=True)
        w, b = w - LR * (left @ d_w @ right), b - LR * (mc * d_b)
    expected = F.cross_entropy(query[0] @ w.t() + b, query[1])
    gradients = torch.autograd.grad(expected, slow)
    loss = looped(learner, support, query)
    loss.backward()
    assert_same([loss, *(p.grad for p in slow)], [expected, *gradients])
    named = dict(learner.named_parameters())
    assert [n.split(".")[0] for n in named] == ["module"] * 2 + ["compute_update"] * 3
    assert all(p is own for p, own in zip(named.values(), slow, strict=True)), "the clone adapts its own"


def test_parameters_without_gradients():
    model = nn.ModuleDict({"used": nn.Linear(5, 3), "unused": nn.Linear(2, 2)}).double()
    model.used.bias.requires_grad_(False)
    x, y = task()
    learner = l2l.algorithms.MAML(model, lr=LR)

    def loss(clone):
        return F.cross_entropy(clone.used(x), y)

    clone = learner.clone()
    with pytest.raises(RuntimeError, match="allow_nograd=True and/or allow_unused=True"):
        clone.adapt(loss(clone))
    with pytest.raises(RuntimeError, match="have been used"):
        clone.adapt(loss(clone), allow_nograd=True)
    unused = clone.unused.weight
    clone.adapt(loss(clone), allow_nograd=True, allow_unused=True)
    assert clone.unused.weight is unused and torch.equal(clone.used.bias, model.used.bias)
    loss(clone).backward()
    assert model.used.weight.grad is not None and model.used.bias.grad is None
    # allow_unused follows allow_nograd, and clones what the learner has
    assert l2l.algorithms.MAML(model, lr=LR, allow_nograd=True).clone().allow_unused
    assert not l2l.algorithms.MAML(model, lr=LR, allow_nograd=True).clone(allow_unused=False).allow_unused
    with pytest.raises(RuntimeError):
        msgd = l2l.algorithms.MetaSGD(model, lr=LR).clone()
        msgd.adapt(loss(msgd))


def test_a_compiled_loss_is_refused():
    """Its second derivative would silently be missing."""
    learner = l2l.algorithms.MAML(nn.Linear(5, 3).double(), lr=LR)
    x, y = task()
    compiled = torch.compile(F.cross_entropy, backend="aot_eager")
    clone = learner.clone()
    with pytest.raises(RuntimeError, match="torch.compile"):
        clone.adapt(compiled(clone(x), y))
    clone.adapt(compiled(clone(x), y), first_order=True)


def test_a_learner_is_its_module():
    learner = l2l.algorithms.MAML(nn.Sequential(nn.Linear(5, 3)), lr=LR)
    learner.module.note = "kept"
    assert learner.note == "kept" and learner.clone().note == "kept"
    assert sorted(learner.state_dict()) == ["module.0.bias", "module.0.weight"]
    with pytest.raises(AttributeError, match="nothing"):
        _ = learner.nothing
    with pytest.raises(AttributeError):
        _ = l2l.algorithms.BaseLearner().nothing
    for other in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
        assert torch.equal(other.module[0].weight, learner.module[0].weight) and other.lr == LR
    nn.utils.clip_grad_norm_(learner.parameters(), 1.0)


def test_a_learner_of_ones_own():
    """As client code writes it: steps into `_parameters` of a clone."""

    class Halving(l2l.algorithms.base_learner.BaseLearner):
        def __init__(self, module):
            super().__init__(module)

        def clone(self):
            return Halving(l2l.clone_module(self.module))

        def adapt(self, loss):
            found = torch.autograd.grad(loss, list(self.module.parameters()), create_graph=True)
            for (name, p), g in zip(list(self.module.named_parameters()), found, strict=True):
                self.module._parameters[name] = p - 0.5 * g

    model, (x, y) = nn.Linear(5, 3).double(), task()
    learner = Halving(model)
    clone = learner.clone()
    clone.adapt(F.cross_entropy(clone(x), y))
    F.cross_entropy(clone(x), y).backward()
    found = model.weight.grad
    model.weight.grad = None
    clone = l2l.algorithms.MAML(model, lr=0.5).clone()
    clone.adapt(F.cross_entropy(clone(x), y))
    F.cross_entropy(clone(x), y).backward()
    assert_same([found], [model.weight.grad])


# modules --------------------------------------------------------------------------------------------------------------
def test_clone_module():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_buffer("learned", torch.ones(2, requires_grad=True))
    model.add_module("none", None)
    clone = l2l.clone_module(model)
    assert clone.none is None and clone[1].running_mean is model[1].running_mean
    assert clone.learned is not model.learned and clone[0].weight is not model[0].weight
    (clone.learned.sum() + clone[0].weight.sum()).backward()
    assert torch.equal(model[0].weight.grad, torch.ones(2, 2)) and torch.equal(model.learned.grad, torch.ones(2))
    tied = l2l.clone_module(Tied())
    assert tied.first.weight is tied.second.weight and len(list(tied.parameters())) == 5
    assert l2l.clone_module("no module") == "no module"


def test_clone_of_a_compiled_module_is_its_own():
    """A compiled forward would go on computing with the weights that it was compiled with."""
    x = torch.randn(2, 2)
    inside = nn.Linear(2, 2)
    in_place = nn.Linear(2, 2)
    in_place.compile(backend="eager")
    for model in (torch.compile(inside, backend="eager"), in_place, nn.Sequential(torch.compile(inside))):
        clone = l2l.clone_module(model)
        l2l.update_module(clone, [torch.ones_like(p) for p in clone.parameters()])
        weight, bias = ((p + 1) for p in model.parameters())
        torch.testing.assert_close(clone(x), x @ weight.t() + bias)


def test_update_module(capsys):
    model = Tied()
    before = list(model.parameters())
    assert l2l.update_module(model, [None, *map(torch.ones_like, before[1:])]) is model
    after = list(model.parameters())
    assert after[0] is before[0] and all(torch.equal(a, b + 1) for a, b in zip(after[1:], before[1:], strict=True))
    model = Tied()
    model.first.weight.update = torch.full((5, 5), 2.0)
    weight = model.first.weight
    l2l.update_module(model)
    assert model.second.weight is model.first.weight and torch.equal(model.first.weight, weight + 2)
    assert weight.update is None and isinstance(model.first.bias, nn.Parameter)
    l2l.update_module(model, [])
    l2l.algorithms.maml_update(model, 0.1, [])
    out = capsys.readouterr().out
    assert "update_module(): Parameters and updates have different length. (5 vs 0)" in out
    assert "maml_update(): Parameters and gradients have different length. (5 vs 0)" in out
    with pytest.raises(ValueError, match=r"grads\[1\] must be \[5\] as its parameter, got \[1, 5\]"):
        l2l.algorithms.maml_update(model, 0.1, [torch.ones(5, 5), torch.ones(1, 5)])


def test_updates_from_attributes():
    """`maml_update` without gradients takes `.update`, `meta_sgd_update` takes `.grad` and `._lr`."""
    layer = nn.Linear(2, 1, bias=False)
    weight = layer.weight
    weight.grad = torch.ones(1, 2)
    assert l2l.algorithms.maml_update(layer, 0.5).weight is weight
    weight._lr = torch.tensor([[0.5, 2.0]])
    l2l.algorithms.meta_sgd_update(layer)
    torch.testing.assert_close(layer.weight, weight - torch.tensor([[0.5, 2.0]]))
    assert weight.grad is None and weight._lr is None


def test_detach_module():
    model = nn.Linear(2, 2)
    clone = l2l.clone_module(model)
    l2l.detach_module(clone, keep_requires_grad=True)
    assert all(p.is_leaf and p.requires_grad for p in clone.parameters())
    l2l.detach_module(clone)
    assert not any(p.requires_grad for p in clone.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_magic_box():
    x = torch.tensor([0.3, -2.0], dtype=torch.float64, requires_grad=True)
    box = l2l.magic_box(x)
    assert torch.equal(box, torch.ones(2, dtype=torch.float64)) and l2l.magic_box(3) == 3
    (first,) = torch.autograd.grad((box * torch.tensor([2.0, 5.0])).sum(), x, create_graph=True)
    assert_same([first], [torch.tensor([2.0, 5.0], dtype=torch.float64)])
    assert_same(torch.autograd.grad(first.sum(), x), [torch.tensor([2.0, 5.0], dtype=torch.float64)])


def test_clone_distribution():
    mean = torch.zeros(2, requires_grad=True) * 1
    dist = torch.distributions.Independent(torch.distributions.Normal(mean, torch.ones(2)), 1)
    clone = l2l.clone_distribution(dist)
    assert clone.base_dist.loc is not mean and clone.base_dist.loc.grad_fn is not None
    torch.testing.assert_close(clone.log_prob(torch.ones(2)), dist.log_prob(torch.ones(2)))
    l2l.detach_distribution(clone)
    assert not clone.base_dist.loc.requires_grad and dist.base_dist.loc.requires_grad


def test_accuracy_and_configs():
    scores = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 3.0]])
    assert float(l2l.utils.accuracy(scores, torch.tensor([1, 1, 1]))) == pytest.approx(2 / 3)
    assert l2l.utils.flatten_config({"a": {"b": 1}, "c": 2}) == {"a.b": 1, "c": 2}


# all tasks at once ----------------------------------------------------------------------------------------------------
def batch_of(tasks=4):
    pairs = [(*task(), *task(7)) for _ in range(tasks)]
    return fastmeta.TaskBatch(*(torch.stack(part) for part in zip(*pairs, strict=True)))


@pytest.mark.parametrize("kind", ["mlp", "conv", "lstm", "tied", "transformer"])
@pytest.mark.parametrize("learner, first_order", [("MAML", False), ("MAML", True), ("MetaSGD", False)])
def test_adapt_batch_is_the_loop(learner, first_order, kind):
    model, batch = MODELS[kind]().double(), batch_of()
    learner = getattr(l2l.algorithms, learner)(model, lr=LR)
    with torch.no_grad():
        for rate in getattr(learner, "lrs", ()):
            rate.mul_(torch.rand_like(rate))
    learner.first_order = first_order
    names = [n for n, _ in learner.named_parameters()]
    losses = [looped(learner, (sx, sy), (qx, qy)) for sx, sy, qx, qy in zip(*batch, strict=True)]
    torch.stack(losses).mean().backward()
    expected = [p.grad.clone() for p in learner.parameters()]
    learner.zero_grad()
    found = l2l.adapt_batch(learner, batch, nn.CrossEntropyLoss(), steps=STEPS)
    found.loss.backward()
    assert_same([found.task_loss, *(p.grad for p in learner.parameters())], [torch.stack(losses), *expected])
    assert found.logits.shape == (4, 7, 3) and found.accuracy.shape == (4,)
    assert [n for n, _ in learner.named_parameters()] == names
    other = pickle.loads(pickle.dumps(copy.deepcopy(learner))).eval()  # nothing of the call travels with it
    assert torch.equal(other(batch[0][0]), learner.eval()(batch[0][0]))


def test_adapt_batch_follows_the_learner():
    """What it remembers of the last call gives way to a new rate, module or number of steps."""
    batch = batch_of(2)
    learner = l2l.algorithms.MAML(mlp().double(), lr=LR)

    def loss(steps=1):
        return l2l.adapt_batch(learner, batch, steps=steps).loss.item()

    found = [loss(), loss(2)]
    learner.lr = 2 * LR
    found.append(loss())
    learner.lr, learner.module = LR, mlp().double()
    found.append(loss())
    assert len(set(found)) == 4 and loss() == found[-1]
    learner.module[0].requires_grad_(False)
    l2l.adapt_batch(learner, batch).loss.backward()
    assert learner.module[0].weight.grad is None and learner.module[2].weight.grad is not None


def test_adapt_batch_refuses():
    batch, learner = batch_of(2), l2l.algorithms.MAML(mlp().double(), lr=LR)

    class Own(l2l.algorithms.MAML):
        def adapt(self, loss):
            pass

    with pytest.raises(ValueError, match="no clone"):
        l2l.adapt_batch(learner.clone(), batch)
    with pytest.raises(ValueError, match="must be a number"):
        l2l.adapt_batch(l2l.algorithms.MAML(mlp(), lr=nn.Parameter(torch.tensor(LR))), batch)
    tensor = l2l.algorithms.MAML(learner.module, lr=torch.tensor(LR, dtype=torch.float64))
    assert torch.equal(l2l.adapt_batch(tensor, batch).loss, l2l.adapt_batch(learner, batch).loss)
    with pytest.raises(TypeError, match="Own's own adapt"):
        l2l.adapt_batch(Own(mlp(), lr=LR), batch)
    with pytest.raises(TypeError, match="must be a MAML or a MetaSGD, got Linear"):
        l2l.adapt_batch(nn.Linear(1, 1), batch)
    with pytest.raises(ValueError, match="steps"):
        l2l.adapt_batch(learner, batch, steps=-1)
    with pytest.raises(ValueError, match="task_chunk"):
        l2l.adapt_batch(learner, batch, task_chunk=0)
    with pytest.raises(ValueError, match="'auto' with MetaSGD"):
        l2l.adapt_batch(l2l.algorithms.MetaSGD(mlp().double()), batch, engine="vmap")


def test_names_that_are_not_here():
    with pytest.raises(ImportError, match="learn2learn 0.2.0 has gym"):
        _ = l2l.gym
    with pytest.raises(ImportError, match="has LightningMAML"):
        from fastmeta.compat.learn2learn.algorithms import LightningMAML  # noqa: F401
    with pytest.raises(ImportError, match="has get_pretrained_backbone"):
        _ = l2l.vision.models.get_pretrained_backbone
    with pytest.raises(AttributeError, match="no attribute 'mamel'"):
        _ = l2l.mamel
