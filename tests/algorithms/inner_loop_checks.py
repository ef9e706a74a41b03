"""What the tests of algorithms with an inner loop share: task batches, nets, and the loop in plain words."""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from fastmeta.nn import mlp
from fastmeta.tasks import TaskBatch, make_tasks

LOSSES = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}


def class_batch(tasks=3, shots=2, queries=3, ways=3, shape=(5,), dtype=torch.float64, seed=0):
    """Every task has its own cluster centres."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(tasks, ways, 1, *shape, generator=g, dtype=torch.float64)

    def rows(count):
        x = centres + 0.3 * torch.randn(tasks, ways, count, *shape, generator=g, dtype=torch.float64)
        return x.flatten(1, 2).to(dtype), torch.arange(ways).repeat_interleave(count).expand(tasks, -1).contiguous()

    return TaskBatch(*rows(shots), *rows(queries))


def value_batch(tasks=3, shots=4, queries=5, width=5, outputs=2, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((tasks, n, w) for n in (shots, queries) for w in (width, outputs))
    return TaskBatch(*(torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes))


def small_mlp(widths=(5, 8, 6, 3), seed=0, dtype=torch.float64, activation="tanh"):
    torch.manual_seed(seed)
    return mlp(widths, activation).to(dtype)


def small_conv(outputs=3, seed=0):
    """Of 1x6x6 images; float64."""
    torch.manual_seed(seed)
    layers = (nn.Conv2d(1, 3, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, outputs))
    return nn.Sequential(*layers).double()


NETS = {"mlp": (small_mlp, (5,)), "conv": (small_conv, (1, 6, 6))}


def plain_loop(model, batch, rate, *, steps, loss="cross_entropy", first_order=False, adapts=lambda name: True):
    """Query losses `[T]`: a task at a time, the rate of a step and a parameter by `rate(step, name)`."""
    losses = []
    for sx, sy, qx, qy in zip(*batch, strict=True):
        slow = dict(model.named_parameters())
        fast = {name: p for name, p in slow.items() if adapts(name)}
        for step in range(steps):
            value = LOSSES[loss](functional_call(model, slow | fast, (sx,)), sy)
            gradients = torch.autograd.grad(value, list(fast.values()), create_graph=not first_order)
            fast = {n: w - rate(step, n) * g for (n, w), g in zip(fast.items(), gradients, strict=True)}
        losses.append(LOSSES[loss](functional_call(model, slow | fast, (qx,)), qy))
    return torch.stack(losses)


def assert_same_meta_gradient(algorithm, batch, task_losses, tolerance=1e-8):
    """The algorithm's loss and its gradient for every parameter are those of `task_losses` `[T]`."""
    output = algorithm(batch)
    torch.testing.assert_close(output.task_loss, task_losses, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(output.loss, task_losses.mean(), rtol=tolerance, atol=tolerance)
    parameters = [p for p in algorithm.parameters() if p.requires_grad]
    ours = torch.autograd.grad(output.loss, parameters, allow_unused=True)
    truth = torch.autograd.grad(task_losses.mean(), parameters, allow_unused=True)
    for a, b in zip(ours, truth, strict=True):
        assert (a is None or not a.any()) == (b is None or not b.any())
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_keeps_the_protocol(algorithm, batch):
    """Tasks do not meet; `adapt` and `predict` are `forward`; `inner_steps` may change; no graph without gradients."""
    output = algorithm(batch)
    logits = algorithm.predict(algorithm.adapt(batch.support_x, batch.support_y), batch.query_x)
    torch.testing.assert_close(output.logits, logits)
    order = torch.randperm(batch.num_tasks)
    turned = algorithm(TaskBatch(*(tensor[order] for tensor in batch)))
    torch.testing.assert_close(turned.task_loss, output.task_loss[order])
    torch.testing.assert_close(turned.logits, output.logits[order])
    with torch.no_grad():
        quiet = algorithm(batch)
        torch.testing.assert_close(quiet.task_loss, output.task_loss.detach())
        assert not quiet.loss.requires_grad
    if batch.query_y.dtype == torch.int64:
        torch.testing.assert_close(output.accuracy, (logits.argmax(-1) == batch.query_y).to(logits).mean(1))
    before = algorithm.inner_steps
    with torch.no_grad():
        by_step = []
        for steps in range(before + 4):
            algorithm.inner_steps = steps
            by_step.append(algorithm(batch).task_loss)
    algorithm.inner_steps = before
    torch.testing.assert_close(by_step[before], output.task_loss.detach())
    assert all((a != b).any() for a, b in zip(by_step, by_step[1:], strict=False))


def assert_saves_and_loads(algorithm, other, batch):
    """`other`, built alike with other weights, gives the same once it has loaded the state."""
    with torch.no_grad():
        expected = algorithm(batch).task_loss
        assert (other(batch).task_loss != expected).any()
        other.load_state_dict(algorithm.state_dict())
        torch.testing.assert_close(other(batch).task_loss, expected, rtol=0, atol=0)


def train_on_sinusoids(algorithm, steps, *, lr=1e-2, tasks=25, shots=10, optimizer=None, seed=1):
    source, generator = make_tasks("sinusoid", shots=shots), torch.Generator().manual_seed(seed)
    optimizer = optimizer or torch.optim.Adam(algorithm.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        algorithm(source.sample(tasks, generator=generator)).loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def sinusoid_error(algorithm, steps=None, *, tasks=500, shots=10):
    """Mean squared error on held-out sinusoids, after `steps` inner steps."""
    before = algorithm.inner_steps
    algorithm.inner_steps = before if steps is None else steps
    algorithm.eval()
    loss = algorithm(
        make_tasks("sinusoid", shots=shots).sample(tasks, generator=torch.Generator().manual_seed(99))
    ).loss
    algorithm.train()
    algorithm.inner_steps = before
    return loss.item()
