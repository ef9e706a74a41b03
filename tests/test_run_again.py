"""Checkpointed parts of a module see, when they run again, the weights of the step that they belong to."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from fastmeta import MAML
from fastmeta.functional import meta_gradient
from fastmeta.functional.run_again import call_again
from fastmeta.tasks import TaskBatch

pytestmark = pytest.mark.filterwarnings("ignore:tasks run one after the other:UserWarning")


class Net(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.block, self.out = nn.Sequential(nn.Linear(6, 8), *layers, nn.Linear(8, 8)), nn.Linear(8, 3)
        self.saving = True

    def forward(self, x):
        h = checkpoint(self.block, x, use_reentrant=False) if self.saving else self.block(x)
        return self.out(torch.tanh(h))


class Attention(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(*[x.view(1, 1, *x.shape)] * 3)[0, 0]


def seen(net, saving):
    """A function of the weights reached by a step, and its gradient."""
    net.saving = saving
    torch.manual_seed(1)
    x = torch.randn(5, 6, dtype=torch.float64)
    weights, call = dict(net.named_parameters()), call_again if saving else functional_call
    found = torch.autograd.grad(call(net, weights, (x,)).square().sum(), list(weights.values()), create_graph=True)
    moved = {name: w - 0.1 * g for (name, w), g in zip(weights.items(), found, strict=True)}
    value = call(net, moved, (x,)).cos().sum()
    return [value.detach(), *torch.autograd.grad(value, list(weights.values()))]


@pytest.mark.parametrize(
    "layers",
    [[], [nn.LayerNorm(8)], [nn.BatchNorm1d(8)], [nn.Dropout(0.5)], [nn.MultiheadAttention]],
    ids=["linear", "layer norm", "batch norm", "dropout", "attention"],
)
def test_second_derivatives(layers):
    torch.manual_seed(0)
    attends = layers == [nn.MultiheadAttention]
    net = Net(*([Attention()] if attends else layers)).double()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.testing.assert_close(seen(net, True), seen(net, False))


def test_the_module_and_the_modes_are_as_before():
    net = Net(nn.LayerNorm(8)).double()
    own = [id(p) for p in net.parameters()]
    seen(net, True)
    assert [id(p) for p in net.parameters()] == own
    assert not torch.overrides._get_current_function_mode_stack()


def test_under_a_default_device():
    """The user's own device context counts when a part runs again, too: what it makes is where it was."""

    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.zeros(x.shape, dtype=x.dtype).to(x.device)

    net = Net(Noise()).double()
    right = seen(net, False)
    with torch.device("cpu"):
        torch.testing.assert_close(seen(net, True), right)
    torch.set_default_device("cpu")
    try:
        torch.testing.assert_close(seen(net, True), right)
    finally:
        torch.set_default_device(None)
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("call", [call_again, functional_call])
def test_compiled(call):
    """What is compiled, in one piece, has the weights that it is given, and not the module's own."""
    torch._dynamo.reset()
    net, x = Net().double(), torch.ones(5, 6, dtype=torch.float64)
    params = {name: w.detach().add(1).requires_grad_() for name, w in net.named_parameters()}

    def loss(params):
        return call(net, params, (x,)).square().mean()

    net.saving, found = False, []
    for one in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        swept = meta_gradient(one, one, params, lr=0.01, steps=2, first_order=True)
        found.append((swept.loss, swept.gradient))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("engine", ["loop", "auto"])
@pytest.mark.parametrize("norm", [False, True])
def test_maml(norm, engine):
    torch.manual_seed(0)
    net = Net(*[nn.LayerNorm(8)] * norm).double()
    sizes = (3, 6, 6), (3, 8, 6)
    x, y = [torch.randn(s).double() for s in sizes], [torch.randint(3, s[:2]) for s in sizes]
    batch, found = TaskBatch(x[0], y[0], x[1], y[1]), []
    for saving in (True, False):
        net.saving = saving
        maml = MAML(net, inner_lr=0.3, inner_steps=2, engine=engine if saving else "loop")
        found.append(torch.autograd.grad(maml(batch).loss, list(net.parameters())))
    torch.testing.assert_close(*found)
