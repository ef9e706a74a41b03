"""`accelerate`: `torch.func` code on the ops, against plain autograd, one task at a time, in float64."""

import copy
import pickle

import pytest
import torch
from conftest import DEVICE
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn import functional as F

import fastmeta
from fastmeta import accelerate
from fastmeta.dispatch import backends
from fastmeta.dispatch.backends import calls
from fastmeta.nn import conv4

T, S = 3, 4


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding="same", bias=False)
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)
        self.second = nn.Conv2d(4, 4, (3, 2), stride=(2, 1), padding=1, groups=2)
        self.group = nn.GroupNorm(2, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        y = self.norm(self.conv(x))
        y = y + F.relu(y)  # what a fused block has made must not be lost where it is used twice
        z = F.avg_pool2d(F.silu(self.group(self.second(y))), 2)
        return self.out(z.mean((2, 3)))


class Odd(nn.Module):
    """What stands between, or is written into, must count."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x):
        y = self.norm(self.conv(x))
        y.mul_(0.5).sub_(0.1)
        y = F.relu(y)
        self.norm(y)
        y = F.relu(y - 0.1)
        self.norm(y)
        y = F.relu(y)
        y = F.max_pool2d(F.relu(self.norm(y), inplace=True), 2, padding=1)
        with torch.no_grad():
            constant = self.norm(y)
        y = y * F.relu(constant)
        view = self.norm(y)
        view[:, 0] = 1.0
        return F.gelu(F.gelu(view), approximate="tanh").flatten(1)[:, -2:]


def sequential(*layers):
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(2))


NETS = {
    "batch": lambda: sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 3, padding=1), nn.BatchNorm2d(3, affine=False, track_running_stats=False), nn.LeakyReLU(0.2),
    ),
    "pool first": lambda: sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.MaxPool2d(2), nn.GELU(),
    ),
    "eval": lambda: sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.MaxPool2d(2)).eval(),
    "instance": lambda: sequential(
        nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.AvgPool2d(2), nn.Conv2d(4, 2, 1), nn.GroupNorm(1, 2)
    ),
    "sequences": lambda: sequential(
        nn.Flatten(2), nn.Conv1d(2, 4, 5, padding="same", dilation=2), nn.BatchNorm1d(4, track_running_stats=False),
        nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(4, 3, 3, stride=2), nn.InstanceNorm1d(3),
    ),
    "residual": Residual,
    "odd": Odd,
}  # fmt: skip


def net(name):
    torch.manual_seed(0)
    model = NETS[name]().to(DEVICE, torch.float64)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(T, S, 2, 6, 7, generator=g, dtype=torch.float64).to(DEVICE)
    y = torch.randint(2, (T, S), generator=g).to(DEVICE)
    with torch.no_grad():
        model(x[0])
        for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            tensor.add_(0.3 * torch.rand(tensor.shape, generator=g, dtype=torch.float64).to(tensor))
    return model, dict(model.named_parameters()), x, y


def loss_of(model):
    return lambda weights, x, y: F.cross_entropy(functional_call(model, weights, x), y)


def in_plain_autograd(model, weights, x, y, steps):
    """Mean loss after the steps of MAML, and its gradient."""
    loss, total = loss_of(model), 0
    for task in range(T):
        fast = weights
        for _ in range(steps):
            found = torch.autograd.grad(loss(fast, x[task], y[task]), list(fast.values()), create_graph=True)
            fast = {name: w - 0.3 * g for (name, w), g in zip(fast.items(), found, strict=True)}
        total = total + loss(fast, x[task].flip(0), y[task].flip(0)) / T
    return total, torch.autograd.grad(total, list(weights.values()))


def in_torch_func(loss, weights, x, y, steps):
    def of_task(weights, x, y):
        fast = weights
        for _ in range(steps):
            found = grad(loss)(fast, x, y)
            fast = {name: w - 0.3 * found[name] for name, w in fast.items()}
        return loss(fast, x.flip(0), y.flip(0))

    total = vmap(of_task, (None, 0, 0))(weights, x, y).mean()
    return total, torch.autograd.grad(total, list(weights.values()))


@pytest.fixture
def ran():
    """How often each op ran since the test began."""
    before = calls.copy()
    return lambda op: sum(n for (name, _), n in (calls - before).items() if name == op)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("what", ["model", "step"])
def test_maml_of_two_steps(name, what, ran):
    model, *given = net(name)
    expected = in_plain_autograd(model, *given, steps=2)
    if what == "model":
        found = in_torch_func(loss_of(accelerate(model)), *given, steps=2)
    else:
        found = accelerate(in_torch_func)(loss_of(model), *given, steps=2)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    assert ran("task_conv2d") and ran("task_conv2d_bwd_weight") and ran("norm_act_pool_bwd")


@pytest.mark.parametrize("name", ["batch", "residual", "sequences"])
def test_gradients_per_sample_jacobians_and_hessian_vector_products(name, ran):
    model, weights, x, y = net(name)
    weights = {key: w.detach() for key, w in weights.items()}
    ours, plain = loss_of(accelerate(model)), loss_of(model)
    tangent = {key: torch.cos(w) for key, w in weights.items()}

    def hvp(loss):
        return grad(lambda w: sum((g * tangent[k]).sum() for k, g in grad(loss)(w, x[0], y[0]).items()))(weights)

    torch.testing.assert_close(hvp(ours), _in_autograd(plain, weights, x[0], y[0], tangent), rtol=1e-8, atol=1e-10)
    per_task = vmap(grad(ours), (None, 0, 0))(weights, x, y)
    for task in range(T):
        one = grad(plain)(weights, x[task], y[task])
        torch.testing.assert_close({key: g[task] for key, g in per_task.items()}, one, rtol=1e-8, atol=1e-10)
    face = accelerate(model)
    jacobians = [jacrev(lambda w, f=f: functional_call(f, w, x[0]))(weights) for f in (face, model)]
    torch.testing.assert_close(*jacobians, rtol=1e-8, atol=1e-10)
    assert ran("norm_act_pool_bwd_bwd")


def _in_autograd(loss, weights, x, y, tangent):
    weights = {key: w.clone().requires_grad_() for key, w in weights.items()}
    found = torch.autograd.grad(loss(weights, x, y), list(weights.values()), create_graph=True)
    total = sum((g * t).sum() for g, t in zip(found, tangent.values(), strict=True))
    found = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    return {k: torch.zeros_like(w) if g is None else g for (k, w), g in zip(weights.items(), found, strict=True)}


def test_norm_activation_and_pool_are_one_block(ran):
    model, weights, x, y = net("batch")
    vmap(grad(loss_of(accelerate(model))), (None, 0, 0))(weights, x, y)
    assert ran("norm_act_pool_bwd") == ran("norm_moments") == 2, "one for each of two blocks"
    assert ran("norm_act_pool") == 3 + 2, "the first with activation and pool, the second with an activation"
    model, weights, x, y = net("pool first")
    vmap(grad(loss_of(accelerate(model))), (None, 0, 0))(weights, x, y)
    assert ran("norm_act_pool") == 5 + 3 + 2, "a GELU stays behind its pool"


def test_shared_weights_stay_one_dense_convolution(monkeypatch):
    shapes, run = [], backends.run

    def watched(spec, args):
        if spec.name.startswith("task_conv2d"):
            shapes.append([t.shape[0] for t in args[:2]])
        return run(spec, args)

    monkeypatch.setattr(backends, "run", watched)
    model, weights, x, y = net("eval")
    loss = loss_of(accelerate(model))
    grad(lambda w: vmap(loss, (None, 0, 0))(w, x, y).mean())(weights)
    assert shapes == [[T, 1], [1, 1]], "forward, and the gradient over the rows of all tasks"


def test_outside_of_transforms_torch_itself_runs(ran):
    model, weights, x, y = net("batch")
    face = accelerate(model)
    assert torch.equal(face(x[0]), model(x[0]))
    torch.testing.assert_close(
        jvp(lambda w: functional_call(face, w, x[0]), (weights,), (weights,)),
        jvp(lambda w: functional_call(model, w, x[0]), (weights,), (weights,)),
    )
    small = nn.Conv2d(2, 1, 3).to(x)
    weights = dict(small.named_parameters())

    def per_task(model, weights):
        return vmap(grad(lambda w, x: functional_call(model, w, x).square().sum()), (None, 0))(weights, x)

    torch._dynamo.reset()
    compiled = torch.compile(per_task, backend="aot_eager")(accelerate(small), weights)
    torch.testing.assert_close(compiled, per_task(small, weights))
    assert not ran("task_conv2d")


def test_what_torch_refuses_it_still_refuses_itself():
    model, weights, x, y = net("batch")
    face = accelerate(model)
    for wrong in (x[0, :, :1], x[0, 0, 0]):
        texts = []
        for function in (face, model):
            with pytest.raises(RuntimeError) as caught:
                grad(lambda w, f=function, x=wrong: functional_call(f, w, x).sum())(weights)
            texts.append(str(caught.value))
        assert texts[0] == texts[1]
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        norm = nn.BatchNorm2d(2, track_running_stats=False).to(x)
        grad(lambda x: accelerate(norm)(x).sum())(x[0, :1, :, :1, :1])


def test_a_module_stays_what_it_is():
    model = conv4(1, 8).to(DEVICE)
    face = accelerate(model)
    assert isinstance(face, type(model)) and face.state_dict().keys() == model.state_dict().keys()
    assert all(a is b for a, b in zip(face.parameters(), model.parameters(), strict=True))
    face.eval()
    assert not model.training and not any(m.training for m in model.modules())
    with torch.no_grad():
        next(face.parameters()).zero_()
    assert next(model.parameters()).abs().sum() == 0
    assert type(model).forward is not type(face).forward and "forward" not in model.__dict__
    for copied in (copy.deepcopy(face), pickle.loads(pickle.dumps(face))):
        assert type(copied) is not type(model) and isinstance(copied, type(model))
        assert next(copied.parameters()) is not next(model.parameters())
        torch.testing.assert_close(copied.state_dict(), model.state_dict())
    with pytest.raises(TypeError, match="model_or_function must be an nn.Module or a function, got int"):
        accelerate(3)
    with pytest.raises(TypeError, match="got the class Linear"):
        accelerate(nn.Linear)


def test_maml_takes_it():
    torch.manual_seed(0)
    model = nn.Sequential(conv4(1, 4, track_running_stats=False), nn.Linear(4, 3)).to(DEVICE, torch.float64)
    x = torch.randn(2, 6, 1, 16, 16, dtype=torch.float64, device=DEVICE)
    y = torch.arange(6, device=DEVICE).fmod(3).expand(2, 6)
    losses = []
    for module in (model, accelerate(model)):
        learner = fastmeta.MAML(module, inner_lr=0.1, inner_steps=2, engine="vmap")
        loss = learner(fastmeta.TaskBatch(x, y, x.flip(1), y.flip(1))).loss
        losses.append((loss, torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(*losses, rtol=1e-8, atol=1e-10)
