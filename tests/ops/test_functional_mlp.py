"""The functional MLP against `nn.Sequential`, one net per task, with weights shared or not."""

import pytest
import torch
from conftest import DEVICE
from test_ops import BACKENDS, require
from torch import nn
from torch.nn import functional as F

from fastmeta import use_backend
from fastmeta.dispatch.spec import Make
from fastmeta.functional import functional_mlp

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
T, B, WIDTHS = 3, 4, (5, 7, 6, 2)


class Sine(nn.Module):
    def forward(self, x):
        return x.sin()


MODULES = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "sine": Sine,
}


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    require(request.param)
    with use_backend(request.param):
        yield request.param


def normal(*shape, seed=0):
    return Make(torch.float64, DEVICE, seed).normal(*shape, scale=0.5)


def sequential(activation, bias=True, seed=0):
    torch.manual_seed(seed)
    layers = []
    for inputs, outputs in zip(WIDTHS[:-1], WIDTHS[1:], strict=True):
        layers += [
            nn.Linear(inputs, outputs, bias, dtype=torch.float64, device=DEVICE),
            MODULES[activation](),
        ]
    return nn.Sequential(*layers[:-1])


def layers(net):
    return [m for m in net if isinstance(m, nn.Linear)]


def by_loop(x, weights, biases, activation):
    """Every task alone; what is shared is indexed by no task."""
    outputs = []
    for t in range(T):
        h = x[t if len(x) > 1 else 0]
        for i, weight in enumerate(weights):
            bias = None if biases is None else biases[i] if biases[i].dim() == 1 else biases[i][t]
            h = F.linear(h, weight if weight.dim() == 2 else weight[t], bias)
            h = MODULES[activation]()(h) if i < len(weights) - 1 else h
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", MODULES)
def test_equals_one_sequential_per_task(activation, bias):
    nets = [sequential(activation, bias, seed) for seed in range(T)]
    weights = [torch.stack(w) for w in zip(*([m.weight for m in layers(net)] for net in nets), strict=True)]
    biases = (
        [torch.stack(b) for b in zip(*([m.bias for m in layers(net)] for net in nets), strict=True)] if bias else None
    )
    x, weight = normal(T, B, 5).requires_grad_(), normal(T, B, 2, seed=1)
    ours = functional_mlp(x, weights, biases, activation)
    truth = torch.stack([net(rows) for net, rows in zip(nets, x, strict=True)])
    torch.testing.assert_close(ours, truth, **CLOSE)
    leaves = [x, *(p for net in nets for p in net.parameters())]
    gradients = (torch.autograd.grad((value * weight).sum(), leaves) for value in (ours, truth))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


# which of x, the weights and the biases of the three layers the tasks share
SHARING = {
    "first layer shared": (False, (True, False, False), (True, False, False)),
    "last layer shared": (False, (False, False, True), (False, False, True)),
    "biases alone per task": (False, (True, True, True), (False, True, False)),
    "all but x shared": (False, (True, True, True), (True, True, True)),
    "x shared": (True, (False, False, False), (False, True, False)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", SHARING)
def test_shared_and_per_task_inputs_mix(case, bias):
    shared_x, shared_weights, shared_biases = SHARING[case]
    pairs = list(zip(WIDTHS[:-1], WIDTHS[1:], strict=True))
    x = normal(1 if shared_x else T, B, 5)
    weights = [normal(*[T] * (not s), o, i, seed=i) for s, (i, o) in zip(shared_weights, pairs, strict=True)]
    biases = (
        [normal(*[T] * (not s), o, seed=o) for s, (_, o) in zip(shared_biases, pairs, strict=True)] if bias else None
    )
    leaves = [t.requires_grad_() for t in (x, *weights, *(biases or []))]
    weight = normal(T, B, 2, seed=9)
    ours, truth = (f(x, weights, biases, "tanh") for f in (functional_mlp, by_loop))
    torch.testing.assert_close(ours, truth, **CLOSE)
    gradients = [torch.autograd.grad((value * weight).sum(), leaves) for value in (ours, truth)]
    for leaf, a, b in zip(leaves, *gradients, strict=True):
        assert a.shape == leaf.shape
        torch.testing.assert_close(a, b, **CLOSE)


def test_gradient_of_shared_weights_is_the_sum_over_tasks():
    x = normal(T, B, 5)
    shared = [normal(7, 5, seed=1).requires_grad_(), normal(2, 7, seed=2).requires_grad_()]
    own = [w.detach().expand(T, -1, -1).clone().requires_grad_() for w in shared]
    sums = torch.autograd.grad(functional_mlp(x, shared, None, "gelu").square().sum(), shared)
    parts = torch.autograd.grad(functional_mlp(x, own, None, "gelu").square().sum(), own)
    for total, part in zip(sums, parts, strict=True):
        torch.testing.assert_close(total, part.sum(0), **CLOSE)


def test_one_set_of_rows_for_every_net():
    """x of T = 1: the same result as a copy for each task, and the gradients of the copies summed."""
    weights = [normal(T, 7, 5, seed=1), normal(T, 2, 7, seed=2)]
    one, copies = normal(1, B, 5).requires_grad_(), normal(1, B, 5).repeat(T, 1, 1).requires_grad_()
    ours, truth = functional_mlp(one, weights, None), functional_mlp(copies, weights, None)
    torch.testing.assert_close(ours, truth, **CLOSE)
    gradient = torch.autograd.grad(ours.square().sum(), one)[0]
    truth = torch.autograd.grad(truth.square().sum(), copies)[0].sum(0, keepdim=True)
    torch.testing.assert_close(gradient, truth, **CLOSE)


@pytest.mark.parametrize("container", [list, tuple, nn.ParameterList])
def test_takes_module_parameters_as_they_are(container):
    net, twin, x = sequential("relu"), sequential("relu"), normal(T, B, 5)
    weights, biases = (container([getattr(m, name) for m in layers(net)]) for name in ("weight", "bias"))
    functional_mlp(x, weights, biases).square().mean().backward()
    twin(x).square().mean().backward()
    for ours, truth in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, truth.grad, **CLOSE)


def test_the_last_layer_has_no_activation():
    x, weight = normal(T, B, 5), normal(T, 2, 5, seed=1)
    outputs = [functional_mlp(x, [weight], None, activation) for activation in MODULES]
    assert outputs[0].min() < 0
    for output in outputs:
        torch.testing.assert_close(output, x @ weight.transpose(1, 2), **CLOSE)


def test_relu_has_slope_0_at_0():
    x = torch.zeros(T, B, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    value = functional_mlp(x, [normal(7, 5), normal(2, 7)], None, "relu")
    assert torch.equal(torch.autograd.grad(value.sum(), x)[0], torch.zeros_like(x))


@pytest.mark.parametrize("shared", ["x", "weights", "biases"])
def test_without_tasks_the_gradient_of_what_they_share_is_0(shared, poisoned_memory):
    """A sum over no tasks: nobody else writes it."""
    x, weights = normal(0, B, 5), [normal(0, 7, 5), normal(0, 2, 7)]
    biases = [normal(0, 7), normal(0, 2)]
    if shared == "x":
        leaves = [x] = [normal(1, B, 5)]
    elif shared == "weights":
        leaves = weights = [normal(7, 5), normal(2, 7)]
    else:
        leaves = biases = [normal(7), normal(2)]
    for leaf in leaves:
        leaf.requires_grad_()
    for gradient in torch.autograd.grad(functional_mlp(x, weights, biases).sum(), leaves):
        assert torch.equal(gradient, torch.zeros_like(gradient))
