"""`MAML.gradients`: what autograd says of `maml(batch).loss`, by one call of a kernel where there is one."""

import copy

import pytest
import torch
from torch import nn

from fastmeta import use_backend
from fastmeta.algorithms import MAML
from fastmeta.dispatch import backends, native
from fastmeta.tasks import TaskBatch


def make(loss="mse", widths=(3, 8, 2), tasks=4, dtype=torch.float64, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)

    def pair(rows):
        x = torch.randn(tasks, rows, widths[0], generator=generator, dtype=dtype)
        if loss == "cross_entropy":
            return x, torch.randint(widths[-1], (tasks, rows), generator=generator)
        return x, torch.rand(tasks, rows, widths[-1], generator=generator, dtype=dtype)

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(*widths[:2]), nn.Tanh(), nn.Linear(*widths[1:])).to(dtype)
    return MAML(model, inner_lr=0.2, inner_steps=2, loss=loss, **options), TaskBatch(*pair(5), *pair(6))


def assert_right(maml, batch):
    """The same as autograd; returns whether a kernel gave output and gradient together."""
    truth = maml(batch)
    wanted = {name: p for name, p in maml.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(truth.loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    backends.calls.clear()
    output, found = maml.gradients(batch)
    assert list(found) == list(wanted)
    for gradient, right in zip(found.values(), gradients, strict=True):
        torch.testing.assert_close(gradient, right)
    for field, right in zip(output, truth, strict=True):
        assert (field is None) == (right is None)
        if field is not None:
            assert not field.requires_grad
            torch.testing.assert_close(field, right.detach())
    assert all(p.grad is None for p in maml.parameters())
    return maml._direct is not None


has_kernel = native.has_kernel("meta_loss_mlp_with_gradient", "cpu")


@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "binary_cross_entropy", "huber"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"first_order": True}, {"engine": "fused"}])
def test_equal_to_autograd(loss, dtype, options):
    maml, batch = make(loss, dtype=dtype, **options)
    assert assert_right(maml, batch) == has_kernel
    assert assert_right(maml, batch) == has_kernel
    right = maml.gradients(batch)[1]
    with torch.no_grad():
        found = maml.gradients(batch)[1]
    assert all(torch.equal(found[name], right[name]) for name in right)


@pytest.mark.skipif(not has_kernel, reason="no compiled kernels for the CPU")
def test_tasks_that_count_for_more():
    maml, batch = make("cross_entropy", tasks=40)
    maml.gradients(batch)
    weights = torch.randn(40, dtype=torch.float64) * (torch.arange(40) % 3 != 1)
    truth = maml(batch)
    loss = (weights * truth.task_loss).mean()
    gradients = torch.autograd.grad(loss, list(maml.parameters()))
    output, found = maml._direct.run(batch, weights.requires_grad_())
    assert not output.loss.requires_grad
    torch.testing.assert_close(output.loss, loss.detach())
    torch.testing.assert_close(output.task_loss, truth.task_loss.detach())
    for gradient, right in zip(found.values(), gradients, strict=True):
        torch.testing.assert_close(gradient, right)


def test_sees_what_changes():
    maml, batch = make()
    assert_right(maml, batch)
    optimizer = torch.optim.SGD(maml.parameters(), lr=0.1)
    for name, p in maml.named_parameters():
        p.grad = maml.gradients(batch)[1][name]
    optimizer.step()
    optimizer.zero_grad()
    assert assert_right(maml, batch) == has_kernel
    maml.load_state_dict({name: t + 0.1 for name, t in maml.state_dict().items()})
    assert_right(maml, batch)
    for p in maml.parameters():
        p.data = p.data * 1.5
    assert_right(maml, batch)
    maml.model[0] = nn.Linear(3, 8).double()
    assert_right(maml, batch)
    maml.model[0].weight = nn.Parameter(2 * maml.model[0].weight.detach())
    assert_right(maml, batch)
    maml.model[1] = nn.Sigmoid()
    assert assert_right(maml, batch) == has_kernel
    maml.inner_lr, maml.inner_steps = 0.1, 3
    assert_right(maml, batch)
    assert_right(maml, TaskBatch(*(t[:3] for t in batch)))
    maml.double().float()
    assert_right(maml, TaskBatch(*(t.float() for t in batch)))
    twin = copy.deepcopy(maml)
    with torch.no_grad():
        next(maml.parameters()).add_(1)
    assert_right(twin, TaskBatch(*(t.float() for t in batch)))


def test_where_the_kernel_is_not_all_of_it():
    maml, batch = make()
    assert_right(maml, batch)
    hook = maml.model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    assert not assert_right(maml, batch)
    hook.remove()
    assert assert_right(maml, batch) == has_kernel
    next(maml.parameters()).requires_grad_(False)
    assert not assert_right(maml, batch)
    next(maml.parameters()).requires_grad_(True)
    with use_backend("reference"):
        assert not assert_right(maml, batch)
    wide, wide_batch = make(widths=(200, 8, 2))  # the first layer in low-rank form
    assert not assert_right(wide, wide_batch)
    with torch.no_grad():
        first = next(maml.parameters())
        first.data = first.t().contiguous().t()
    assert not assert_right(maml, batch)
    module = MAML(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double(), loss="mse")
    assert not assert_right(module, batch)


def test_in_chunks():
    maml, batch = make(task_chunk=3)
    for tasks in (None, 3):
        assert assert_right(maml, TaskBatch(*(t[:tasks] for t in batch))) == has_kernel


def test_inputs_that_require_gradients_and_wrong_ones():
    maml, batch = make("cross_entropy")
    assert_right(maml, batch)
    leading = TaskBatch(batch[0].clone().requires_grad_(), *batch[1:])
    found = maml.gradients(leading)[1]
    for gradient, right in zip(found.values(), maml.gradients(batch)[1].values(), strict=True):
        torch.testing.assert_close(gradient, right)
    assert leading[0].grad is None
    with pytest.raises(ValueError, match="support_y"):
        maml.gradients(TaskBatch(batch[0], batch[1] + 5, *batch[2:]))
    with pytest.raises(ValueError, match="query_x"):
        maml.gradients(TaskBatch(*batch[:2], batch[2][:2], batch[3][:2]))
