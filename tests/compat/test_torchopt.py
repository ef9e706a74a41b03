"""`fastmeta.compat.torchopt`: against autograd by hand, torch's own optimisers, and TorchOpt where it is installed."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from fastmeta.compat import torchopt

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
# TorchOpt takes the bias correction in the default dtype, here float32 for float64 weights
ROUNDED = {"rtol": 1e-4, "atol": 1e-7}
META = {
    "SGD": ("MetaSGD", {"lr": 0.1}),
    "momentum": ("MetaSGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
    "nesterov": ("MetaSGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "Adam": ("MetaAdam", {"lr": 0.02, "weight_decay": 0.1}),
    "Adam, inside": ("MetaAdam", {"lr": 0.02, "eps_root": 1e-3, "maximize": True, "betas": (0.5, 0.6)}),
    "Adam, accelerated": ("MetaAdam", {"lr": 0.02, "use_accelerated_op": True}),
    "AdamW": ("MetaAdamW", {"lr": 0.02, "maximize": True, "weight_decay": 0.2}),
    "RMSProp": ("MetaRMSProp", {"lr": 0.02, "momentum": 0.5, "weight_decay": 0.1, "initial_scale": 0.1}),
    "AdaDelta": ("MetaAdaDelta", {"lr": 1.0, "weight_decay": 0.1}),
    "AdaGrad": ("MetaAdagrad", {"lr": 0.1, "lr_decay": 0.3, "initial_accumulator_value": 0.1, "maximize": True}),
    "AdaMax": ("MetaAdaMax", {"lr": 0.02, "weight_decay": 0.1}),
    "RAdam": ("MetaRAdam", {"lr": 0.02, "betas": (0.5, 0.8)}),
    "centred": ("MetaRMSProp", {"lr": 0.02, "centered": True, "nesterov": False}),
}
each_optimiser = pytest.mark.parametrize("name", META)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def rows(seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(5, 3, generator=g).double(), torch.randn(5, 1, generator=g).double()


def meta_gradient(library, model, name, steps=3):
    kind, settings = META[name]
    weights = list(model.parameters())
    optimizer = getattr(library, kind)(model, **settings)
    for step in range(steps):
        x, y = rows(step)
        optimizer.step(mse_loss(model(x), y))
    x, y = rows(10)
    loss = mse_loss(model(x), y)
    return loss, torch.autograd.grad(loss, weights)


# steps ----------------------------------------------------------------------------------------------------------------
@each_optimiser
def test_numbers_of_torchopt(name):
    theirs = pytest.importorskip("torchopt")
    loss, gradients = meta_gradient(torchopt, net(), name)
    truth, their_gradients = meta_gradient(theirs, net(), name)
    torch.testing.assert_close(loss, truth, **CLOSE)
    # the accelerated op's own gradient leaves eps out of a derivative
    close = {"rtol": 1e-5, "atol": 1e-7} if "accelerated" in name else CLOSE
    for a, b in zip(gradients, their_gradients, strict=True):
        torch.testing.assert_close(a, b, **close)


@each_optimiser
def test_meta_gradient_by_differences(name):
    model = net()
    start = [p.detach().clone() for p in model.parameters()]
    _, gradients = meta_gradient(torchopt, model, name)
    direction = [torch.randn_like(p) for p in start]
    along = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    step, values = 1e-6, []
    for sign in (1, -1):
        moved = net()
        for p, q, d in zip(moved.parameters(), start, direction, strict=True):
            p.data = q + sign * step * d
        values.append(meta_gradient(torchopt, moved, name)[0])
    torch.testing.assert_close(along, (values[0] - values[1]) / (2 * step), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "ours, torchs, settings",
    [
        ("SGD", "SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
        ("Adam", "Adam", {"lr": 0.02, "weight_decay": 0.1}),
        ("AdamW", "AdamW", {"lr": 0.02, "weight_decay": 0.1, "maximize": True}),
        ("RMSProp", "RMSprop", {"lr": 0.02, "momentum": 0.9, "centered": True}),
        ("AdaDelta", "Adadelta", {"lr": 1.0, "weight_decay": 0.1}),
        ("AdaGrad", "Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1}),
        ("AdaMax", "Adamax", {"lr": 0.02, "weight_decay": 0.1}),
        ("RAdam", "RAdam", {"lr": 0.02, "weight_decay": 0.1, "betas": (0.5, 0.9)}),
    ],
)
def test_plain_optimisers_are_those_of_torch(ours, torchs, settings):
    models = net(), net()
    optimizers = [
        getattr(torchopt, ours)(models[0].parameters(), **settings),
        getattr(torch.optim, torchs)(models[1].parameters(), **settings),
    ]
    for step in range(9):
        x, y = rows(step)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            optimizer.step()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert a.is_leaf
        torch.testing.assert_close(a, b, **ROUNDED)
    leaves = torchopt.pytree.tree_leaves(optimizers[0].state_dict())
    assert all(t.grad_fn is None for t in leaves if isinstance(t, torch.Tensor))


def test_a_step_by_hand():
    """The tutorial's: x.grad = -4 lr x^3 + 2 a x."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(1.0))

        def forward(self, x):
            return self.a * x**2

    for make in (lambda m: torchopt.MetaSGD(m, lr=1.0), lambda m: torchopt.MetaOptimizer(m, torchopt.sgd(lr=1.0))):
        model, x = Net(), nn.Parameter(torch.tensor(2.0))
        make(model).step(model(x))
        model(x).backward()
        assert x.grad.item() == -28
    model, x = Net(), nn.Parameter(torch.tensor(2.0))
    clipped = torchopt.chain(torchopt.clip_grad_norm(max_norm=2.0), torchopt.sgd(lr=1.0, moment_requires_grad=True))
    torchopt.MetaOptimizer(model, clipped).step(model(x))
    model(x).backward()
    assert x.grad.item() == pytest.approx(-12, rel=1e-5)


def test_formulas():
    """The second of two steps with gradients 2 and 1, by hand."""

    def second(impl):
        params, state = (torch.tensor(5.0, dtype=torch.float64),), None
        state = impl.init(params)
        for g in (2.0, 1.0):
            updates, state = impl.update((torch.tensor(g, dtype=torch.float64),), state, params=params, inplace=False)
        return updates[0].item()

    m, v = 0.5 * (0.5 * 2) + 0.5, 0.8 * (0.2 * 4) + 0.2
    root = (v / (1 - 0.8**2) + 0.3) ** 0.5 + 0.1
    step = m / (1 - 0.5**2) / root
    adam = {"lr": 0.1, "betas": (0.5, 0.8), "eps": 0.1, "eps_root": 0.3}
    assert second(torchopt.adam(**adam)) == pytest.approx(-0.1 * step, rel=1e-6)
    assert second(torchopt.adamw(**adam, weight_decay=0.2)) == pytest.approx(-0.1 * (step + 0.2 * 5), rel=1e-6)
    v = 0.8 * (0.8 * 3 + 0.2 * 4) + 0.2
    m = 0.8 * (0.2 * 2) + 0.2
    rms = {"lr": 0.1, "alpha": 0.8, "eps": 0.1, "initial_scale": 3.0}
    assert second(torchopt.rmsprop(**rms)) == pytest.approx(-0.1 / (v**0.5 + 0.1))
    assert second(torchopt.rmsprop(**rms, centered=True)) == pytest.approx(-0.1 / ((v - m * m) ** 0.5 + 0.1))
    sgd = {"lr": 0.1, "momentum": 0.5}
    assert second(torchopt.sgd(**sgd, dampening=0.2, weight_decay=0.1)) == pytest.approx(-0.1 * (0.5 * 2.5 + 0.8 * 1.5))
    assert second(torchopt.sgd(**sgd, nesterov=True, maximize=True)) == pytest.approx(0.1 * (1 + 0.5 * (0.5 * 2 + 1)))


@pytest.mark.parametrize("accelerated", [False, True])
def test_where_no_gradient_has_come(accelerated):
    """The derivative of the step is what it tends to, where TorchOpt gives NaN, or 0."""
    weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    scale = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torchopt.FuncOptimizer(torchopt.adam(0.1, use_accelerated_op=accelerated))
    (moved,) = optimizer.step((weight * scale).sum(), (weight,))
    (gradient,) = torch.autograd.grad(moved.sum(), scale)
    torch.testing.assert_close(gradient, torch.full_like(scale, -0.1 / 1e-8), rtol=1e-6, atol=0)
    moved = torchopt.FuncOptimizer(torchopt.rmsprop(0.1)).step((weight * scale).sum(), (weight,))[0]
    (gradient,) = torch.autograd.grad(moved.sum(), scale)
    torch.testing.assert_close(gradient, torch.full_like(scale, -0.1 / 1e-8), **CLOSE)


def test_learned_rates_and_schedules():
    weight, lr = torch.ones(2, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    (moved,) = torchopt.FuncOptimizer(torchopt.sgd(lr)).step((3 * weight).sum(), (weight,))
    assert torch.autograd.grad(moved.sum(), lr)[0].item() == -6
    rate = torchopt.schedule.linear_schedule(1.0, 0.0, transition_steps=4, transition_begin=1)
    assert [rate(i) for i in range(6)] == [1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    halves = torchopt.schedule.exponential_decay(1.0, 0.5, transition_steps=2, staircase=True, end_value=0.3)
    assert [halves(i) for i in (0, 1, 2, 3, 4)] == [1.0, 1.0, 0.5, 0.5, 0.3]
    optimizer = torchopt.FuncOptimizer(torchopt.sgd(rate))
    params = (torch.zeros(1, requires_grad=True),)
    places = []
    for _ in range(4):
        params = optimizer.step(params[0].sum(), params)
        places.append(-params[0].item())
    assert places == [1.0, 2.0, 2.75, 3.25]


def test_functions_on_trees():
    params = {"a": torch.ones(2), "b": [torch.full((3,), 2.0), None]}
    grads = {"a": torch.full((2,), 4.0), "b": [None, None]}
    impl = torchopt.adamw(0.1, weight_decay=0.5, mask=lambda leaves: [leaf is not None for leaf in leaves])
    updates, state = impl.update(grads, impl.init(params), params=params)
    assert grads["a"][0] == 4.0 and updates["b"] == [None, None]
    torch.testing.assert_close(updates["a"], torch.full((2,), -0.1 * (1 + 0.5)))
    moved = torchopt.apply_updates(params, updates)
    assert moved["a"] is params["a"] and moved["b"][0] is params["b"][0] and moved["a"][0] != 1
    again = torchopt.apply_updates(params, updates, inplace=False)
    assert again["a"] is not params["a"]
    assert [c if c is None else int(c) for c in state[0].count] == [1, 0, None]
    with pytest.raises(AssertionError, match="Parameters are required"):
        impl.update(grads, state)


def test_chains():
    parts = [torchopt.transform.scale(2.0), torchopt.base.identity(), torchopt.nan_to_num(nan=7.0)]
    assert isinstance(torchopt.chain(), torchopt.base.IdentityGradientTransformation)
    assert torchopt.chain(parts[0]) is parts[0]
    chained = torchopt.chain(*parts)
    assert isinstance(chained, torchopt.base.ChainedGradientTransformation) and len(chained.transformations) == 2
    assert parts[0].chain(parts[2]) == chained == copy.copy(chained) and hash(chained) == hash(copy.copy(chained))
    updates, _ = chained.update([torch.tensor([torch.nan, 1.0])], chained.init([torch.ones(2)]))
    assert updates[0].tolist() == [7.0, 2.0]
    with pytest.raises(ValueError, match="same in chain"):
        chained.update([torch.ones(2)], ())
    seen = []
    hooked = torchopt.chain(torchopt.register_hook(lambda g: seen.append(g)), torchopt.sgd(1.0))
    weight = torch.ones(1, requires_grad=True)
    (moved,) = torchopt.FuncOptimizer(hooked).step(weight.square().sum(), (weight,))
    moved.sum().backward()
    assert len(seen) == 1


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: torchopt.sgd(-1.0), "Invalid learning rate: -1.0"),
        (lambda: torchopt.adam(betas=(0.9, 1.0)), "Invalid beta parameter at index 1: 1.0"),
        (lambda: torchopt.adamw(eps=-1.0), "Invalid epsilon value: -1.0"),
        (lambda: torchopt.adam(weight_decay=-1.0), "Invalid weight_decay value: -1.0"),
        (lambda: torchopt.rmsprop(alpha=-1.0), "Invalid alpha value: -1.0"),
        (lambda: torchopt.sgd(0.1, momentum=-1.0), "Invalid momentum value: -1.0"),
        (lambda: torchopt.sgd(0.1, nesterov=True), "Nesterov momentum requires"),
    ],
)
def test_wrong_settings(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_wrong_kinds():
    for kind in (torchopt.MetaOptimizer, torchopt.Optimizer, torchopt.FuncOptimizer):
        with pytest.raises(TypeError, match="not a GradientTransformation"):
            kind(*[net()] * (kind is not torchopt.FuncOptimizer), object())
    for call in (torchopt.extract_state_dict, functools.partial(torchopt.recover_state_dict, state=())):
        with pytest.raises(RuntimeError, match="Unexpected class"):
            call([1])
    with pytest.raises(AssertionError, match="by must"):
        torchopt.extract_state_dict(net(), by="value")


# states ---------------------------------------------------------------------------------------------------------------
class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)

    def forward(self, x):
        return self.norm(self.body(x))


@pytest.mark.parametrize("by", ["reference", "copy", "deepcopy", "ref", "clone", "deepclone"])
def test_states_out_and_back(by):
    model, x = Normed(), torch.randn(5, 3)
    optimizer = torchopt.MetaAdam(model, lr=0.1)
    optimizer.step(model(x).square().sum())
    state = torchopt.extract_state_dict(model, by=by)
    of_optimizer = torchopt.extract_state_dict(optimizer, by=by)
    weight, mean = model.body.weight, model.norm.running_mean.clone()
    before = weight.clone()
    optimizer.step(model(x).square().sum())
    assert not torch.equal(model.body.weight, before)
    torchopt.recover_state_dict(model, state)
    torchopt.recover_state_dict(optimizer, of_optimizer)
    new = model.body.weight
    assert torch.equal(new, before)
    shared = by in ("reference", "ref")
    assert (new is weight) == shared and (new.grad_fn is None) == by.startswith("deep") and new.requires_grad
    # the running mean is changed in place: only a clone of it is what it was
    assert torch.equal(model.norm.running_mean, mean) != shared
    assert optimizer.state_groups[0][0].count[0] == 1
    mu = torchopt.extract_state_dict(optimizer)[0][0].mu[0]
    assert mu is optimizer.state_groups[0][0].mu[0]


def test_buffers():
    model, x = Normed(), torch.randn(5, 3)
    state = torchopt.extract_state_dict(model, by="reference", detach_buffers=True)
    for _ in range(2):  # a state with clones of buffers is good for more than one recovery
        model(x)
        assert model.norm.num_batches_tracked == 1
        torchopt.recover_state_dict(model, state)
        assert model.norm.num_batches_tracked == 0 and model.body.weight is state.params[0]["weight"]
    assert torchopt.extract_state_dict(model, with_buffers=False).buffers == ()


def test_clones():
    model, x = Normed(), torch.randn(5, 3)
    weights = list(model.parameters())
    shared = torchopt.module_clone(model, by="reference", detach_buffers=True)
    assert shared is not model and shared.body.weight is weights[0]
    assert shared.norm.running_mean is not model.norm.running_mean
    copied = torchopt.module_clone(model, by="copy")
    gradient = torch.autograd.grad(copied(x).square().sum() + copied.body.weight.sum(), weights[0])
    assert gradient[0] is not None
    torchopt.MetaSGD(copied, lr=0.1).step(copied(x).square().sum())
    alone = torchopt.module_clone(copied, by="deepcopy")
    assert alone.body.weight.is_leaf and torch.equal(alone.body.weight, copied.body.weight)
    assert model.body.weight is weights[0]
    tree = {"a": weights[0], "b": None}
    assert torchopt.module_clone(tree, by="copy")["a"].grad_fn is not None
    assert torchopt.module_clone(weights[0], device="meta").is_meta


def test_stop_gradient():
    model, x = Normed(), torch.randn(5, 3)
    optimizer = torchopt.MetaAdam(model, lr=0.1)
    optimizer.step(model(x).square().sum())
    state = torchopt.extract_state_dict(model, by="copy")
    assert state.params[0]["weight"].grad_fn is not None
    for target in (state, optimizer, model):
        torchopt.stop_gradient(target)
    leaves = torchopt.pytree.tree_leaves((tuple(state), optimizer.state_dict(), list(model.parameters())))
    assert all(t.is_leaf for t in leaves if isinstance(t, torch.Tensor))
    assert model.body.weight.requires_grad
    value = 2 * model.body.weight
    assert torchopt.module_detach_([value])[0] is value and value.is_leaf
