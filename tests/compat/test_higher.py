"""`fastmeta.compat.higher`: against autograd by hand, torch's own optimisers, and higher where it is installed."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss

from fastmeta.compat import higher

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
OPTIMISERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "Adam": (torch.optim.Adam, {"lr": 0.02, "weight_decay": 0.1}),
    "amsgrad": (torch.optim.Adam, {"lr": 0.02, "betas": (0.5, 0.6), "amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 1.0, "weight_decay": 0.1}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.02, "weight_decay": 0.1}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.1, "lambd": 0.3, "t0": 1, "weight_decay": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.02, "momentum": 0.5, "weight_decay": 0.1}),
    "centered": (torch.optim.RMSprop, {"lr": 0.02, "centered": True}),
    "Rprop": (torch.optim.Rprop, {"lr": 0.02}),
}
each_optimiser = pytest.mark.parametrize("name", OPTIMISERS)


def made(name, params, **changes):
    kind, settings = OPTIMISERS[name]
    return kind(params, **settings | changes)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def rows(seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(5, 3, generator=g).double(), torch.randn(5, 1, generator=g).double()


@pytest.fixture(autouse=True)
def no_warning_of_rprop():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(Rprop|RMSprop|to a scalar).*")
        yield


def meta_gradient(library, model, opt, steps=3, override=None):
    """Loss and gradients, to weights and to hyper-parameters, after an inner loop."""
    weights = list(model.parameters())
    learned = [leaf for leaf in library.utils.flatten(override or {}) if torch.is_tensor(leaf)]
    with library.innerloop_ctx(model, opt, copy_initial_weights=False, override=override) as (fmodel, diffopt):
        for step in range(steps):
            x, y = rows(step)
            diffopt.step(mse_loss(fmodel(x), y))
        x, y = rows(10)
        loss = mse_loss(fmodel(x), y)
    return loss, torch.autograd.grad(loss, weights + learned, allow_unused=True)


# numbers --------------------------------------------------------------------------------------------------------------
@each_optimiser
def test_weights_are_those_of_torch(name):
    """Also with groups of their own settings, and from the state of an optimiser that has taken steps."""
    # torch keeps the rate of ASGD in a float32 tensor, and adds Adam's eps elsewhere
    close = {"rtol": 1e-5, "atol": 1e-8} if name in ("ASGD", "Adam", "amsgrad") else CLOSE
    model = net()
    first, second = list(model[0].parameters()), list(model[2].parameters())
    opt = made(name, [{"params": second, "lr": 0.05}, {"params": first}])
    for step in range(4):
        if step in (0, 2):
            fmodel = higher.monkeypatch(model)
            diffopt = higher.get_diff_optim(opt, model.parameters(), fmodel)
        x, y = rows(step)
        diffopt.step(mse_loss(fmodel(x), y))
        opt.zero_grad()
        mse_loss(model(x), y).backward()
        opt.step()
        for p, fast in zip(model.parameters(), fmodel.parameters(), strict=True):
            torch.testing.assert_close(fast, p, **close)


@each_optimiser
def test_meta_gradient_by_differences(name):
    model = net()
    opt = made(name, model.parameters())
    loss, gradients = meta_gradient(higher, model, opt)
    direction = [torch.randn_like(p) for p in model.parameters()]
    along = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    step, values = 1e-6, []
    for sign in (1, -1):
        moved = net()
        for p, q, d in zip(moved.parameters(), model.parameters(), direction, strict=True):
            p.data = q.data + sign * step * d
        values.append(meta_gradient(higher, moved, made(name, moved.parameters()))[0])
    torch.testing.assert_close(along, (values[0] - values[1]) / (2 * step), rtol=1e-6, atol=1e-7)


@each_optimiser
@pytest.mark.parametrize("learned", [False, True])
def test_numbers_of_higher(name, learned):
    theirs = pytest.importorskip("higher")
    if name == "AdamW" and not hasattr(theirs.optim, "DifferentiableAdamW"):
        pytest.skip("came after 0.2.1")
    results = []
    for library in (higher, theirs):
        model = net()
        opt = made(name, model.parameters())
        override = None
        if learned:
            override = library.optim.get_trainable_opt_params(opt)
            override = {key: library.utils._recursive_map(value, widened) for key, value in override.items()}
        results.append(meta_gradient(library, model, opt, override=override))
    (loss, gradients), (truth, their_gradients) = results
    # in higher the count of Adagrad's steps is a float32 tensor, and so is what it divides
    close = {"rtol": 1e-6, "atol": 1e-8} if name == "Adagrad" else CLOSE
    torch.testing.assert_close(loss, truth, **close)
    for ours, their in zip(gradients, their_gradients, strict=True):
        assert (ours is None) == (their is None)
        if ours is not None:
            torch.testing.assert_close(ours, their, **close)


def widened(t):
    return t.detach().double().requires_grad_()


@pytest.mark.parametrize("name", ["Adam", "amsgrad", "AdamW", "Adagrad", "RMSprop"])
def test_where_no_gradient_has_come(name):
    """A unit without a row: the derivative of the step there is what it tends to, not NaN."""
    weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    scale = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    opt = made(name, [weight], lr=0.1, weight_decay=0.0)
    diffopt = higher.get_diff_optim(opt, [weight])
    moved = diffopt.step((weight * scale * torch.tensor([1.0, 0.0])).sum(), params=[weight])[0]
    (gradient,) = torch.autograd.grad(moved.sum(), scale, create_graph=True)
    eps = {"Adagrad": 1e-10, "Adam": 1e-8 / (1 - 0.999) ** 0.5, "amsgrad": 1e-8 / (1 - 0.6) ** 0.5}.get(name, 1e-8)
    expected = torch.tensor([-0.1 / eps, 0.0], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, **CLOSE)
    (again,) = torch.autograd.grad(gradient.sum(), scale)
    assert torch.equal(again, torch.zeros_like(again))


def test_what_torch_has_added_since():
    for settings in ({"maximize": True}, {"decoupled_weight_decay": True, "weight_decay": 0.5}):
        model = net()
        opt = torch.optim.Adam(model.parameters(), lr=0.1, eps=0.0, **settings)
        x, y = rows(0)
        with higher.innerloop_ctx(model, opt) as (fmodel, diffopt):
            diffopt.step(mse_loss(fmodel(x), y))
        mse_loss(model(x), y).backward()
        opt.step()
        for p, fast in zip(model.parameters(), fmodel.parameters(), strict=True):
            torch.testing.assert_close(fast, p, **CLOSE)


# the optimiser --------------------------------------------------------------------------------------------------------
def test_a_learned_loss():
    """Two steps down a network's value, by hand."""
    model, judge = net(), net(1)
    x, y = rows(0)
    opt = torch.optim.SGD(model.parameters(), lr=0.3)
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diffopt):
        for _ in range(2):
            diffopt.step(judge(fmodel(x).expand(-1, 3)).mean())
        loss = mse_loss(fmodel(x), y)
    fast = dict(model.named_parameters())
    for _ in range(2):
        value = judge(torch.func.functional_call(model, fast, (x,)).expand(-1, 3)).mean()
        grads = torch.autograd.grad(value, list(fast.values()), create_graph=True)
        fast = {name: p - 0.3 * g for (name, p), g in zip(fast.items(), grads, strict=True)}
    truth = mse_loss(torch.func.functional_call(model, fast, (x,)), y)
    leaves = [*model.parameters(), *judge.parameters()]
    torch.testing.assert_close(loss, truth, **CLOSE)
    gradients = zip(
        *(torch.autograd.grad(value, leaves, allow_unused=True) for value in (loss, truth)), strict=True
    )
    for ours, expected in gradients:
        assert (ours is None) == (expected is None)
        if ours is not None:
            torch.testing.assert_close(ours, expected, **CLOSE)


def test_bare_tensors():
    """As energy-based models and attacks use it: weights go in and out of `step`."""
    start = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    centre = torch.tensor([3.0, 0.5], dtype=torch.float64, requires_grad=True)
    diffopt = higher.get_diff_optim(torch.optim.SGD([start], lr=0.25), [start])
    point = start
    for _ in range(2):
        with torch.no_grad(), torch.enable_grad():
            (point,) = diffopt.step((point - centre).square().sum(), params=[point])
    torch.testing.assert_close(point, centre + (start - centre) / 4)
    gradients = torch.autograd.grad(point.sum(), [start, centre])
    torch.testing.assert_close(gradients[0], torch.full_like(start, 0.25))
    torch.testing.assert_close(gradients[1], torch.full_like(start, 0.75))
    with pytest.raises(ValueError, match="params"):
        diffopt.step(point.sum())
    with pytest.raises(ValueError, match="reference parameters"):
        higher.get_diff_optim(torch.optim.SGD([start], lr=0.25), [centre])


def test_frozen_and_unused_weights_stay():
    model = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1), nn.Linear(3, 1)])
    model[1].requires_grad_(False)
    opt = torch.optim.Adam(model.parameters(), lr=0.1)
    fmodel = higher.monkeypatch(model)
    diffopt = higher.get_diff_optim(opt, model.parameters(), fmodel)
    diffopt.step((fmodel[0](torch.ones(1, 3)) + fmodel[1](torch.ones(1, 3))).sum())
    for part, (new, old) in enumerate(zip(fmodel.fast_params, model.parameters(), strict=True)):
        assert torch.equal(new, old) == (part >= 2)


def test_override_and_groups_and_callback():
    model = net()
    first, second = model[0], model[2]
    opt = torch.optim.SGD([{"params": first.parameters()}, {"params": second.parameters()}], lr=0.1)
    rates = [torch.tensor(0.2, requires_grad=True), torch.tensor(0.3, requires_grad=True)]
    x, y = rows(0)
    with higher.innerloop_ctx(model, opt, override={"lr": rates}) as (fmodel, diffopt):
        assert [group["lr"] for group in diffopt.param_groups] == rates
        grads = torch.autograd.grad(mse_loss(fmodel(x), y), fmodel.fast_params, create_graph=True)
        new = diffopt.step(mse_loss(fmodel(x), y), grad_callback=lambda grads: [2 * g for g in grads])
        expected = [p - 2 * r * g for p, g, r in zip(fmodel.init_fast_params, grads, [rates[0]] * 2 + [rates[1]] * 2,
                                                     strict=True)]  # fmt: skip
        assert all(a is b for a, b in zip(new, fmodel.fast_params, strict=True))
        for a, b in zip(new, expected, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
        assert all(g is not None for g in torch.autograd.grad(new[0].sum() + new[2].sum(), rates))
        diffopt.step(mse_loss(fmodel(x), y), override={"lr": [0.0]})
        for a, b in zip(fmodel.fast_params, new, strict=True):
            assert torch.equal(a, b)
        with pytest.raises(ValueError, match="Mismatch"):
            diffopt.step(mse_loss(fmodel(x), y), override={"lr": [0.1, 0.1, 0.1]})
    assert opt.param_groups[0]["lr"] == 0.1


def test_callback_for_all_steps():
    weight, seen = torch.tensor([2.0], requires_grad=True), []

    def halved(grads):
        seen.append(grads[0].requires_grad)
        return [g / 2 for g in grads]

    for track in (True, False):
        opt = torch.optim.SGD([weight], lr=1.0)
        diffopt = higher.get_diff_optim(opt, [weight], track_higher_grads=track, grad_callback=halved)
        assert diffopt.step(weight.square().sum(), params=[weight])[0].item() == 0.0
    assert seen == [True, False]


def test_the_average_of_asgd():
    """It takes in the decayed weights before the step, from step t0 on with weight 1 / (steps since)."""
    weight = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    diffopt = higher.get_diff_optim(torch.optim.ASGD([weight], lr=0.1, lambd=0.5, t0=1, alpha=1.0), [weight])
    point, places, eta = weight, [], 0.1
    for step in range(1, 5):
        places.append(point.item() * (1 - 0.5 * eta))
        (point,) = diffopt.step(point.sum(), params=[point])
        assert point.item() == pytest.approx(places[-1] - eta)
        eta = 0.1 / (1 + 0.5 * 0.1 * step)
    average = places[2] + (places[3] - places[2]) / 2  # mu is 1 until t0 + 1, then 1/2
    assert diffopt.state[0][0]["ax"].item() == pytest.approx(average)


def test_hyper_parameters_out_and_back():
    model = net()
    opt = torch.optim.Adam([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.5}], lr=0.1)
    override = higher.optim.get_trainable_opt_params(opt)
    assert {"lr", "betas", "eps", "weight_decay", "amsgrad"} <= set(override) and "params" not in override
    assert [t.item() for t in override["lr"]] == pytest.approx([0.1, 0.5])
    assert isinstance(override["betas"][0], tuple) and override["betas"][0][1].requires_grad
    with torch.no_grad():
        override["lr"][1] += 0.25
        override["betas"][0][0].sub_(0.4)
    higher.optim.apply_trainable_opt_params(opt, override)
    assert opt.param_groups[1]["lr"] == pytest.approx(0.75) and type(opt.param_groups[1]["lr"]) is float
    assert opt.param_groups[0]["betas"] == pytest.approx((0.5, 0.999))
    assert opt.param_groups[0]["amsgrad"] is False
    higher.optim.apply_trainable_opt_params(opt, {"lr": [torch.tensor(2.0)]})
    assert [group["lr"] for group in opt.param_groups] == [2.0, 2.0]
    with pytest.raises(ValueError, match="Mismatch"):
        higher.optim.apply_trainable_opt_params(opt, {"lr": [1.0] * 3})


def test_an_optimiser_made_for_fast_weights():
    model, (x, y) = net(), rows(0)
    fmodel = higher.monkeypatch(model)
    w = fmodel.fast_params
    groups = [{"params": w[:2], "lr": 0.3}, {"params": w[2]}, {"params": w[3]}]
    for params in (None, w, groups):
        before = fmodel.fast_params
        grads = torch.autograd.grad(mse_loss(fmodel(x), y), before)
        diffopt = higher.create_diff_optim(torch.optim.SGD, {"lr": 0.1}, params, fmodel)
        rates = [0.3, 0.3, 0.1, 0.1] if params is groups else [0.1] * 4
        for new, p, g, lr in zip(diffopt.step(mse_loss(fmodel(x), y)), before, grads, rates, strict=True):
            torch.testing.assert_close(new, p - lr * g, **CLOSE)
    with pytest.raises(ValueError, match="fmodel or params"):
        higher.create_diff_optim(torch.optim.SGD, {"lr": 0.1})
    with pytest.raises(ValueError, match="not supported"):
        higher.create_diff_optim(torch.optim.LBFGS, fmodel=fmodel)


def test_an_optimiser_of_ones_own():
    class Halving(torch.optim.SGD):
        pass

    class DifferentiableHalving(higher.optim.DifferentiableOptimizer):
        def _update(self, grouped_grads, **kwargs):
            for group, grads in zip(self.param_groups, grouped_grads, strict=True):
                for i, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                    group["params"][i] = p if g is None else higher.optim._add(p / 2, -group["lr"], g)

    weight = torch.tensor(4.0, requires_grad=True)
    with pytest.raises(ValueError, match="not supported"):
        higher.get_diff_optim(Halving([weight], lr=1.0), [weight])
    higher.register_optim(Halving, DifferentiableHalving)
    diffopt = higher.get_diff_optim(Halving([weight], lr=1.0), [weight])
    assert diffopt.step(weight.square(), params=[weight])[0].item() == 2.0 - 8.0


def test_masked_gradients():
    """Where the mask is, a root at 0 has no infinite gradient, nor one of the gradient."""
    x = torch.tensor([0.0, 4.0], dtype=torch.float64, requires_grad=True)
    higher.optim._maybe_mask(x, x == 0)
    y = (x * 1.0).sqrt()
    higher.optim._maybe_mask(torch.ones(2), x == 0)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert first.tolist() == [0.0, 0.25]
    (second,) = torch.autograd.grad(first.sum(), x)
    assert second.tolist() == [0.0, -1 / 32]


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5, 2, sparse=True)
    with higher.innerloop_ctx(table, torch.optim.SGD(table.parameters(), lr=0.1)) as (fmodel, diffopt):
        with pytest.raises(RuntimeError, match="sparse"):
            diffopt.step(fmodel(torch.tensor([1, 2])).sum())


# the patched module ---------------------------------------------------------------------------------------------------
def test_history_and_first_order():
    model, (x, y) = net(), rows(0)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with higher.innerloop_ctx(model, opt) as (fmodel, diffopt):
        first = fmodel.fast_params
        for _ in range(2):
            diffopt.step(mse_loss(fmodel(x), y))
        assert list(fmodel.parameters(time=0)) == first == fmodel.init_fast_params
        assert first[0] is not model[0].weight and first[0].is_leaf
        assert list(fmodel.parameters())[0] is fmodel.fast_params[0] is fmodel[0].weight
        assert list(fmodel.parameters(time=1))[0] is not fmodel.fast_params[0]
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False, track_higher_grads=False) as (fmodel, diffopt):
        start = fmodel.parameters(time=0)
        diffopt.step(mse_loss(fmodel(x), y))
        assert all(p.is_leaf and p.requires_grad for p in fmodel.parameters())
        mse_loss(fmodel(x), y).backward()
        assert all(p.grad is None for p in model.parameters())
        assert next(start) is not fmodel.fast_params[0] and len(fmodel._fast_params) == 1
        with pytest.raises(Exception, match="not tracked"):
            _ = fmodel.init_fast_params
        with pytest.raises(ValueError, match="latest"):
            fmodel.parameters(time=1)
        with pytest.raises(ValueError, match="boolean"):
            fmodel.track_higher_grads = 1


def test_given_weights():
    model, (x, _) = net(), rows(0)
    fmodel = higher.monkeypatch(model)
    other = [torch.randn_like(p) for p in model.parameters()]
    names = dict(zip(dict(model.named_parameters()), other, strict=True))
    expected = torch.func.functional_call(model, names, (x,))
    assert torch.equal(fmodel(x, params=other), expected)
    assert torch.equal(fmodel(x), expected)
    assert {name: p for name, p in fmodel.named_parameters()} == names
    assert torch.equal(fmodel.state_dict()["2.bias"], other[3])
    fmodel.fast_params = (2 * p for p in other)
    assert torch.equal(fmodel(x), torch.func.functional_call(model, {n: 2 * p for n, p in names.items()}, (x,)))
    fmodel[2].bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    assert fmodel.fast_params[3] is fmodel[2].bias and len(fmodel._fast_params) == 4
    assert torch.equal(fmodel[2](torch.ones(4).double()), (2 * other[2]).sum(1))
    with pytest.raises(TypeError, match="Tensor"):
        fmodel[2].bias = None
    with pytest.raises(ValueError, match="patched"):
        higher.monkeypatch(fmodel)


def test_made_functional():
    model, (x, _) = net(), rows(0)
    fmodel = higher.patch.make_functional(model)
    assert fmodel.fast_params is None
    with pytest.raises(ValueError, match="params"):
        fmodel(x)
    with pytest.raises(Exception, match="no fast weights"):
        fmodel.parameters()
    assert torch.equal(fmodel(x, params=list(model.parameters())), model(x))
    assert isinstance(fmodel, nn.Sequential) and type(fmodel).__name__ == "FunctionalSequential"
    assert len(fmodel[:2]) == 2 and fmodel.training
    other = copy.deepcopy(higher.monkeypatch(model))
    other[2].weight = torch.zeros(1, 4, dtype=torch.float64)
    assert other[2].root is other and other.fast_params[2] is other[2].weight


class Tied(nn.Module):
    """One weight in two places, one module in two, a method kept as an attribute, a parameter that is None."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3)
        self.second, self.again = nn.Linear(3, 3), self.norm
        self.second.weight = self.first.weight
        self.act = self.times
        self.scale = nn.Parameter(torch.tensor(2.0))

    def times(self, x):
        return self.scale * x

    def forward(self, x):
        return self.act(self.second(self.again(self.norm(self.first(x)))))


def test_shared_weights_and_buffers():
    model = Tied().double()
    x, _ = rows(0)
    fmodel = higher.monkeypatch(model, copy_initial_weights=False)
    assert len(fmodel.fast_params) == len(list(model.parameters())) == 5
    before = model.norm.running_mean.clone()
    grads = torch.autograd.grad(fmodel(x).square().sum(), list(model.parameters()))
    assert torch.equal(model.norm.running_mean, before) and fmodel.norm.num_batches_tracked == 2
    for ours, truth in zip(grads, torch.autograd.grad(model(x).square().sum(), list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, truth, **CLOSE)
    torch.testing.assert_close(fmodel.norm.running_mean, model.norm.running_mean)
    other = [2 * p for p in model.parameters()]
    expected = torch.func.functional_call(model, dict(zip(dict(model.named_parameters()), other, strict=True)), (x,))
    torch.testing.assert_close(fmodel(x, params=other), expected, **CLOSE)
    fmodel.eval()
    assert not fmodel.norm.training and model.norm.training


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.TransformerEncoderLayer, nn.MultiheadAttention, nn.Conv1d])
def test_layers_of_all_kinds(kind):
    torch.manual_seed(0)
    if kind is nn.TransformerEncoderLayer:
        model = kind(4, 2, 8, dropout=0.0)
    else:
        model = kind(4, 2, 1) if kind is nn.Conv1d else kind(4, 2)
    model, x = model.double(), torch.randn(3, 4, 4, dtype=torch.float64)

    def value(m):
        with sdpa_kernel(SDPBackend.MATH):  # the only one that torch differentiates twice
            out = m(x, x, x) if kind is nn.MultiheadAttention else m(x)
        return (out[0] if isinstance(out, tuple) else out).square().sum()

    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diffopt):
        diffopt.step(value(fmodel))
        gradients = torch.autograd.grad(value(fmodel), list(model.parameters()))
    names, old = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(value(model), old, create_graph=True)
    with torch.nn.utils.stateless._reparametrize_module(
        model, {n: p - 0.01 * g for n, p, g in zip(names, old, grads, strict=True)}
    ):
        later = value(model)
    for ours, truth in zip(gradients, torch.autograd.grad(later, old), strict=True):
        torch.testing.assert_close(ours, truth, **CLOSE)


def test_a_graph_is_freed_with_its_loop():
    """Without waiting for the collector: a copy knows its parts, and they know it weakly."""
    model, (x, y) = net(), rows(0)
    gc.disable()
    try:
        with higher.innerloop_ctx(model, torch.optim.Adam(model.parameters())) as (fmodel, diffopt):
            diffopt.step(mse_loss(fmodel(x), y))
            step = weakref.ref(fmodel.fast_params[0])
        del fmodel, diffopt
        assert step() is None
    finally:
        gc.enable()
