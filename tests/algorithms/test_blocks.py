"""Convolutional encoders whose norms, activations and pools run together: all that can be seen is as in torch."""

import copy

import pytest
import torch
from conftest import DEVICE
from torch import nn

from fastmeta.algorithms import ProtoNet, _blocks
from fastmeta.batch import TaskBatch
from fastmeta.dispatch.backends import calls
from fastmeta.nn import conv4

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU torch itself runs")
_relu = nn.ReLU(inplace=True)
NETS = {
    "conv4": lambda: conv4(1, 6),
    "nested": lambda: nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=None), _relu, nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.BatchNorm2d(3, affine=False, eps=0.01), _relu),
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.AvgPool2d(2), nn.ReLU(),
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.GELU(), nn.BatchNorm2d(4), nn.Dropout(0.0),
        nn.LeakyReLU(0.3), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.LeakyReLU(0.3), nn.AvgPool2d((2, 1)), nn.Flatten(),
    ),
}  # fmt: skip
FUSED = {"conv4": 4, "nested": 5}


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """Of any backend: what is tested here is what is asked of it."""
    monkeypatch.setattr(_blocks, "_has_kernels", lambda: True)
    monkeypatch.setattr(_blocks, "_LEAST", 0)


def net(name, dtype=torch.float64):
    torch.manual_seed(0)
    model = NETS[name]().to(DEVICE, dtype).to(memory_format=torch.channels_last)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def images(n=6, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 18, 19, generator=g, dtype=torch.float64).to(DEVICE, dtype)


def results(model, run, *, train):
    """Outputs of three batches, gradients of first and second order, what the buffers then hold."""
    found = []
    model.train(train)
    for batch in images().split(2):
        x = batch.requires_grad_()
        y = run(model, x)
        inputs = [x, *model.parameters()]
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        found += [y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs, allow_unused=True)]
    return [*(t for t in found if t is not None), *model.buffers()]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_as_torch(name, train):
    model = net(name)
    expected = results(copy.deepcopy(model), lambda model, x: model(x), train=train)
    before = calls.copy()
    found = results(model, lambda model, x: _blocks.call(model, (x,), {}), train=train)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    assert sum(n for (op, _), n in (calls - before).items() if op == "norm_act_pool") == 3 * FUSED[name]


def watched(model):
    model.encoder[0][1].register_forward_hook(lambda module, args, output: output.mul_(2))


def full_backward(model):
    model.encoder[0][1].register_full_backward_hook(lambda module, grads, outputs: tuple(2 * g for g in grads))


def own_forward(model):
    model.encoder[0][1].forward = lambda x: x + 1


def other_class(model):
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return x - 1

    model.encoder[0][1] = Own(6).double()


@pytest.mark.parametrize("change", [watched, full_backward, own_forward, other_class, None])
def test_what_would_notice_goes_to_torch(change):
    model = net("conv4")
    if change is not None:
        change(model)
    x = images().requires_grad_()
    if change is None:
        model.to(memory_format=torch.contiguous_format)
    before = calls.copy()
    y = _blocks.call(model, (x,), {})
    torch.testing.assert_close(y, model(x), rtol=0, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(z.square().sum(), x)[0] for z in (y, model(x))), rtol=0, atol=0)
    assert calls == before


def test_transforms_autocast_and_odd_inputs_go_to_torch():
    model = net("conv4", torch.float32).eval()
    x = images(dtype=torch.float32)
    before = calls.copy()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(_blocks.call(model, (x,), {}), model(x), rtol=0, atol=0)
    mapped = torch.func.vmap(lambda x: _blocks.call(model, (x,), {}))(x[None])
    torch.testing.assert_close(mapped[0], model(x))
    for wrong in (x.double(), x[:, :, 0], "text"):
        with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
            _blocks.call(model, (wrong,), {})
        with pytest.raises(type(caught.value)):
            model(wrong)
    assert calls == before


def test_small_ones_go_to_torch(monkeypatch):
    model, x = net("conv4"), images()
    monkeypatch.setattr(_blocks, "_LEAST", 6 * 6 * 9 * 9)  # what the second norm is given
    before = calls.copy()
    torch.testing.assert_close(_blocks.call(model, (x,), {}), model(x))
    assert sum(n for (op, _), n in (calls - before).items() if op == "norm_act_pool") == 2


def test_convolutions_that_the_op_computes_faster(monkeypatch):
    """3x3 taps of many channels, or of a picture's few; the others are torch's."""
    monkeypatch.setattr(_blocks, "_LEAST_OF_CONVOLUTION", 0)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),  # the op
        nn.Conv2d(32, 33, 3, padding="same", bias=False), nn.BatchNorm2d(33), nn.ReLU(),  # the op
        nn.Conv2d(33, 32, 3), nn.Conv2d(32, 32, 3, padding=1, stride=2), nn.Conv2d(32, 8, 3, padding=1),
        nn.Conv2d(8, 32, 3, padding=1), nn.Conv2d(32, 32, 1), nn.Flatten(),
    ).to(memory_format=torch.channels_last)  # fmt: skip
    x = torch.randn(4, 3, 17, 19).contiguous(memory_format=torch.channels_last).requires_grad_()

    def results(model, run):
        y = run(model)
        return [y, *torch.autograd.grad(y.square().mean(), [x, *model.parameters()])]

    exact = copy.deepcopy(model).double()
    expected = results(exact, lambda model: model(x.double()))
    before = calls.copy()
    found = results(model, lambda model: _blocks.call(model, (x,), {}))
    assert sum(n for (op, _), n in (calls - before).items() if op == "task_conv2d") == 2
    for ours, right in zip(found, expected, strict=True):
        at_most = 1e-5 * float(right.detach().abs().max()) + 1e-9  # the bias before a norm has the gradient 0
        torch.testing.assert_close(ours.double(), right.double(), rtol=1e-4, atol=at_most)


def test_a_learner_uses_it():
    model = net("conv4")
    x = images(12).view(2, 6, 1, 18, 19)
    y = torch.arange(6).fmod(3).expand(2, 6)
    batch = TaskBatch(x, y, x.flip(1), y.flip(1))
    before = calls.copy()
    ours = ProtoNet(copy.deepcopy(model))
    loss = ours(batch).loss
    assert (calls - before)["norm_act_pool", "reference"] + (calls - before)["norm_act_pool", "cpp"] == 4
    hooked = ProtoNet(model)
    model.encoder[0][1].register_forward_hook(lambda *args: None)
    expected = hooked(batch).loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.state_dict(), hooked.state_dict())
