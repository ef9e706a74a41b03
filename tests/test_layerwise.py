"""Nets of layers with weights of each task's own: every kind of layer, against the task loop in float64."""

import pytest
import torch
from module_kinds import KINDS, make, plain, tasks
from torch import nn
from torch.nn import functional as F

from fastmeta.algorithms import MAML
from fastmeta.dispatch import backends
from fastmeta.engines._task_tensor import TaskTensor
from fastmeta.tasks import TaskBatch

CLOSE = {"rtol": 1e-7, "atol": 1e-9}


def block(norm, *rest, channels=4, **conv):
    return nn.Sequential(nn.Conv2d(2, channels, 3, padding=1, **conv), norm, *rest, nn.Flatten(), nn.LazyLinear(3))


class Residual(nn.Module):
    def __init__(self, in_place: bool):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm, self.other, self.act = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.LeakyReLU(0.1, inplace=in_place)
        self.in_place, self.out = in_place, nn.LazyLinear(3)

    def forward(self, x):
        identity = self.act(self.norm(self.first(x)))
        out = self.other(self.second(identity))
        if self.in_place:
            out += identity
        else:
            out = out + identity
        return self.out(F.adaptive_avg_pool2d(self.act(out), 1).flatten(1))


class Joined(nn.Module):
    """Outputs of a norm that are asked for twice, once through an activation and once as they are."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.LazyLinear(3)

    def forward(self, x):
        n = self.norm(self.conv(x))
        return self.out(torch.cat([F.max_pool2d(F.relu(n), 2), n[:, :, :1, ::2], F.avg_pool2d(n, 2)], 1).flatten(1))


class WrittenOver(nn.Module):
    """What a norm was given is written over before its activation runs."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv, self.out = nn.InstanceNorm2d(2), nn.Conv2d(4, 4, 3), nn.LazyLinear(3)

    def forward(self, x):
        seen = x.clone()
        n = self.norm(seen)
        seen.mul_(3.0)
        seen += 1
        seen.clamp_(min=-1.0)
        return self.out(self.conv(torch.cat([F.relu(n), seen], 1)).flatten(1))


class HalfFrozen(nn.Module):
    """A part without gradients, whose last layer is a norm."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.out = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.LazyLinear(3)

    def forward(self, x):
        with torch.no_grad():
            h = self.norm(self.body(x))
        return self.out(F.max_pool2d(F.relu(h), 2).flatten(1))


NETS = {
    "pool, relu": lambda: block(nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.ReLU()),
    "relu, pool": lambda: block(nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
    "no statistics of its own": lambda: block(nn.BatchNorm2d(4, track_running_stats=False), nn.LeakyReLU(0.2)),
    "not affine": lambda: block(nn.BatchNorm2d(4, affine=False), nn.SiLU(), nn.AvgPool2d(2)),
    "pool before gelu": lambda: block(nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.GELU()),
    "average before relu": lambda: block(nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.ReLU()),
    "tanh gelu": lambda: block(nn.BatchNorm2d(4), nn.GELU(approximate="tanh")),
    "group norm": lambda: block(nn.GroupNorm(2, 4), nn.GELU(), nn.MaxPool2d(2)),
    "instance norm": lambda: block(nn.InstanceNorm2d(4, affine=True), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
    "layer norm": lambda: block(nn.LayerNorm([4, 5, 6]), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)),
    "no norm": lambda: block(nn.Identity(), nn.ReLU(), nn.MaxPool2d(2)),
    "two activations": lambda: block(nn.BatchNorm2d(4), nn.ReLU(), nn.SiLU(), nn.Dropout(0.0)),
    "two pools": lambda: block(nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.MaxPool2d(2)),
    "strides and groups": lambda: block(nn.BatchNorm2d(4), nn.ReLU(), stride=2, groups=2, bias=False),
    "dilated": lambda: block(nn.BatchNorm2d(4), nn.ReLU(), dilation=(2, 1)),
    "same, even": lambda: nn.Sequential(
        nn.Conv2d(2, 4, (2, 3), padding="same"), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)
    ),
    "valid": lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding="valid"), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)),
    "reflected": lambda: block(nn.BatchNorm2d(4), nn.ReLU(), padding_mode="reflect"),
    "frozen convolution": lambda: _frozen(block(nn.BatchNorm2d(4), nn.ReLU())),
    "residual": lambda: Residual(False),
    "residual, in place": lambda: Residual(True),
    "joined": Joined,
    "written over": WrittenOver,
    "a part without gradients": HalfFrozen,
    "one dimension": lambda: nn.Sequential(
        nn.Flatten(2), nn.Conv1d(2, 4, 5, stride=2, padding=2), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(4, 4, 3, padding="same"), nn.GroupNorm(2, 4), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        nn.Linear(4, 3), nn.BatchNorm1d(3),
    ),
    "transposed": lambda: block(nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2)),
}  # fmt: skip


def _frozen(net):
    net[0].weight.requires_grad_(False)
    return net


def case(name, tasks=3):
    torch.manual_seed(0)
    net = NETS[name]().double()
    net(torch.randn(4, 2, 5, 6, dtype=torch.float64))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.5)
    labels = [torch.randint(3, (tasks, rows)) for rows in (4, 3)]
    x = [torch.randn(tasks, rows, 2, 5, 6, dtype=torch.float64) for rows in (4, 3)]
    return net, TaskBatch(x[0], labels[0], x[1], labels[1])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETS)
def test_equals_the_loop_over_tasks(name, training):
    net, batch = case(name)
    net.train(training)
    for first_order in (False, True):
        losses, predictions, gradients = plain(net, batch, steps=2, first_order=first_order, lr=0.2)
        for memory in ("graph", "sweep"):
            options = dict(inner_lr=0.2, inner_steps=2, first_order=first_order, memory=memory)
            out = MAML(net, engine="layerwise", **options)(batch)
            torch.testing.assert_close(out.task_loss.detach(), losses, **CLOSE)
            torch.testing.assert_close(out.logits.detach(), predictions, **CLOSE)
            named = {n: p for n, p in net.named_parameters() if p.requires_grad}
            found = torch.autograd.grad(out.loss, list(named.values()), allow_unused=True, materialize_grads=True)
            torch.testing.assert_close(dict(zip(named, found, strict=True)), gradients, **CLOSE)
            with torch.no_grad():
                maml = MAML(net, engine="layerwise", **options)
                state = maml.adapt(batch.support_x, batch.support_y)
                torch.testing.assert_close(maml.predict(state, batch.query_x), predictions, **CLOSE)


def test_nets_of_convolutions_are_taken():
    net, batch = case("pool, relu")
    before = dict(backends.calls)
    assert "layerwise: picked" in MAML(net).explain(batch)
    MAML(net)(batch).loss.backward()
    ran = {name for (name, _), count in backends.calls.items() if count > before.get((name, _), 0)}
    assert {"task_conv2d", "task_conv2d_bwd_weight", "norm_moments", "norm_act_pool", "norm_act_pool_bwd"} <= ran


@pytest.mark.parametrize("name", ["pool, relu", "relu, pool"])
def test_a_block_is_one_call(name):
    net, batch = case(name)
    before = backends.calls["norm_act_pool", "reference"] + backends.calls["norm_act_pool", "cpp"]
    with torch.no_grad():
        MAML(net, inner_steps=0, engine="layerwise")(batch)
    after = backends.calls["norm_act_pool", "reference"] + backends.calls["norm_act_pool", "cpp"]
    assert after == before + 1


@pytest.mark.filterwarnings("ignore:There is a performance drop.*aten.._weight_norm:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_any_module(kind):
    """Right, or refused with a reason."""
    net, batch = make(kind), TaskBatch(*tasks(kind))
    losses, _, gradients = plain(net, batch, steps=2, first_order=False, lr=0.3)
    try:
        out = MAML(net, inner_lr=0.3, inner_steps=2, engine="layerwise")(batch)
    except Exception as error:
        expected = ("spectral norm", "checkpointed", "own autograd.Function", "depends on the data")
        assert kind in expected, error
        return
    torch.testing.assert_close(out.task_loss.detach(), losses, **CLOSE)
    named = {n: p for n, p in net.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(out.loss, list(named.values()), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(dict(zip(named, found, strict=True)), gradients, **CLOSE)


def test_the_modules_buffers_stay():
    net, batch = case("pool, relu")
    before = {name: b.clone() for name, b in net.named_buffers()}
    MAML(net, engine="layerwise")(batch).loss.backward()
    torch.testing.assert_close(dict(net.named_buffers()), before, rtol=0, atol=0)


def test_what_a_module_sees_is_one_task():
    x = TaskTensor(torch.randn(3, 4, 5))
    assert x.shape == (4, 5) and x.size(0) == 4 and x.dim() == 2 and len(x) == 4 and x.dtype == torch.float32
    y = x + torch.ones(5)
    assert y.values.shape == (3, 4, 5) and (x * x.mean()).values.shape == (3, 4, 5)
    torch.testing.assert_close((x * x.mean()).values, x.values * x.values.mean((1, 2), keepdim=True))
    z = x.clone()
    z += 1
    z.mul_(2)
    torch.testing.assert_close(z.values, 2 * (x.values + 1))


def test_a_kernel_larger_than_the_image_is_torchs_error():
    net, batch = block(nn.BatchNorm2d(4)).double(), case("pool, relu")[1]
    net(torch.randn(4, 2, 5, 6, dtype=torch.float64))
    small = TaskBatch(batch.support_x[..., :1], batch.support_y, batch.query_x[..., :1], batch.query_y)
    net[0].padding = (0, 0)
    with pytest.raises(ValueError, match="support_x has rows .* Kernel size can't be greater"):
        MAML(net, engine="layerwise")(small)


def test_numbers_that_the_module_looks_at_are_refused():
    with pytest.raises(RuntimeError, match="item"):
        TaskTensor(torch.randn(3, 4)).sum().item()
