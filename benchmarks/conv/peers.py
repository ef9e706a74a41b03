"""The meta-gradient of a convolutional net as people write it today, and plain training on the same rows.

Each function takes a `Problem` and returns a contender: a call without arguments that gives the gradients of all
parameters, in their order. Parameters and tasks are laid out before it is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from .. import contenders
from ..measure import Contender
from .problem import Problem, in_one_row

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Forward = Callable[[nn.Sequential, dict[str, Tensor], Tensor], Tensor]  # weights and rows of all tasks [T, ...]


def _laid_out(problem: Problem, memory_format: torch.memory_format) -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    """A copy of the net and the tasks one by one, images in this format."""

    def image(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=memory_format) if x.dim() == 4 else x

    tasks = [tuple(map(image, task)) for task in zip(*problem.batch, strict=True)]
    return copy.deepcopy(problem.model).to(memory_format=memory_format), tasks


# one task after the other ----------------------------------------------------------------------------------------


def loop(problem: Problem, memory_format: torch.memory_format, summed: bool = False) -> Contender:
    """Plain autograd with `create_graph`. The gradient of each task is added up at once, which is quickest and needs
    the memory of one task; `summed`: the losses are, as most repositories have it, and one backward follows."""
    model, tasks = _laid_out(problem, memory_format)
    names, slow = zip(*model.named_parameters(), strict=True)

    def query_loss(support_x, support_y, query_x, query_y):
        def run(weights, x):
            return functional_call(model, dict(zip(names, weights, strict=True)), (x,))

        fast = list(slow)
        for _ in range(problem.steps):
            value = F.cross_entropy(run(fast, support_x), support_y)
            grads = torch.autograd.grad(value, fast, create_graph=not problem.first_order)
            fast = [torch.sub(p, g, alpha=problem.lr) for p, g in zip(fast, grads, strict=True)]
        return F.cross_entropy(run(fast, query_x), query_y) / len(tasks)

    def run():
        if summed:
            return list(torch.autograd.grad(torch.stack([query_loss(*task) for task in tasks]).sum(), slow))
        total = list(torch.autograd.grad(query_loss(*tasks[0]), slow))
        for task in tasks[1:]:
            torch._foreach_add_(total, torch.autograd.grad(query_loss(*task), slow))
        return total

    return run


def compiled_loop(problem: Problem) -> Contender:
    """`torch.compile` of one task's whole meta-gradient, called for one task after the other."""
    model, tasks = _laid_out(problem, torch.channels_last)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def query_loss(params, *task):
        return contenders.task_query_loss(model, params, F.cross_entropy, *task, problem.lr, problem.steps)

    torch._dynamo.reset()
    compiled = torch.compile(grad(query_loss), dynamic=False)

    def run():
        total = None
        for task in tasks:
            found = [g / len(tasks) for g in compiled(params, *task).values()]
            total = found if total is None else torch._foreach_add(total, found)
        return total

    return run


# all tasks at once -----------------------------------------------------------------------------------------------


def vmap_of_grad(problem: Problem) -> Contender:
    """`vmap(grad(...))`, as the tutorials of `torch.func` have it."""
    of = problem.model, F.cross_entropy, problem.batch, problem.lr, problem.steps
    return lambda: contenders.maml_by_vmap(*of)


class WrittenOut(nn.Module):
    """A batch norm in operations whose second derivative `torch.func` has right: in an affine `F.batch_norm` under
    `vmap(grad(...))` it takes the saved statistics for constants."""

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        over, wide = [0, *range(2, x.dim())], (-1, *[1] * (x.dim() - 2))
        var, mean = torch.var_mean(x, over, correction=0, keepdim=True)
        return (x - mean) * (torch.rsqrt(var + self.eps) * self.weight.view(wide)) + self.bias.view(wide)


def vmap_of_grad_written_out(problem: Problem) -> Contender:
    """The same with its batch norms written out, which gives the right gradient."""
    layers = (WrittenOut(m) if isinstance(m, nn.modules.batchnorm._BatchNorm) else m for m in in_one_row(problem.model))
    return vmap_of_grad(Problem(nn.Sequential(*layers), problem.batch, problem.lr, problem.steps))


def mapped(model: nn.Sequential, fast: dict[str, Tensor], x: Tensor) -> Tensor:
    """`vmap` of the forward pass alone: differentiated outside of it, batch norms are right."""
    return vmap(partial(functional_call, model))(fast, (x,))


def grouped(model: nn.Sequential, fast: dict[str, Tensor], x: Tensor) -> Tensor:
    """All tasks in one convolution, a group each: `[B, T * C, H, W]`."""
    tasks = len(x)
    h = x.transpose(0, 1).flatten(1, 2)
    for name, layer in model.named_children():
        weight, bias = fast.get(f"{name}.weight"), fast.get(f"{name}.bias")
        if isinstance(layer, nn.Conv2d):
            h = F.conv2d(h, weight.flatten(0, 1), bias.flatten(), layer.stride, layer.padding, groups=tasks)
        elif isinstance(layer, nn.BatchNorm2d):
            h = F.batch_norm(h, None, None, weight.flatten(), bias.flatten(), True, eps=layer.eps)
        elif isinstance(layer, nn.Flatten):
            h = h.unflatten(1, (tasks, -1)).flatten(2).transpose(0, 1)
        elif isinstance(layer, nn.Linear):
            h = torch.baddbmm(bias.unsqueeze(1), h, weight.mT)
        else:
            h = layer(h)
    return h


def unfolded(model: nn.Sequential, fast: dict[str, Tensor], x: Tensor) -> Tensor:
    """Patches as columns and a product for each task in one `bmm`; `[T, C, B, H, W]` between the layers."""
    h = x.transpose(1, 2)
    for name, layer in model.named_children():
        weight, bias = fast.get(f"{name}.weight"), fast.get(f"{name}.bias")
        if isinstance(layer, nn.Conv2d):
            tasks, channels, rows, height, width = h.shape
            columns = F.unfold(h.flatten(0, 1), layer.kernel_size, padding=layer.padding)  # [T * C, B * 9, pixels]
            columns = columns.view(tasks, channels, rows, -1, columns.shape[2]).transpose(2, 3)
            columns = columns.reshape(tasks, weight[0, 0].numel(), -1)
            h = torch.baddbmm(bias.unsqueeze(2), weight.flatten(2), columns)
            h = h.view(tasks, -1, rows, height, width)  # stride 1, padded to the same size
        elif isinstance(layer, nn.BatchNorm2d):
            rows = h.flatten(0, 1).flatten(1).unsqueeze(0)  # [1, T * C, B * pixels]
            rows = F.batch_norm(rows, None, None, weight.flatten(), bias.flatten(), True, eps=layer.eps)
            h = rows.view(h.shape)
        elif isinstance(layer, nn.Flatten):
            h = h.transpose(1, 2).flatten(2)
        elif isinstance(layer, nn.Linear):
            h = torch.baddbmm(bias.unsqueeze(1), h, weight.mT)
        else:
            h = layer(h.flatten(0, 1)).unflatten(0, h.shape[:2])
    return h


def at_once(problem: Problem, forward: Forward) -> Contender:
    """All tasks together through `forward`, plain autograd around it."""
    model, batch = in_one_row(copy.deepcopy(problem.model)), problem.batch
    names, slow = zip(*model.named_parameters(), strict=True)
    tasks = batch.num_tasks

    def loss(fast, x, y):  # the mean of the tasks' losses
        predictions = forward(model, dict(zip(names, fast, strict=True)), x)
        return F.cross_entropy(predictions.flatten(0, 1), y.flatten())

    def run():
        fast = [p.unsqueeze(0).expand(tasks, *p.shape) for p in slow]
        for _ in range(problem.steps):
            grads = torch.autograd.grad(loss(fast, batch.support_x, batch.support_y), fast, create_graph=True)
            fast = [torch.sub(p, g, alpha=problem.lr * tasks) for p, g in zip(fast, grads, strict=True)]
        return list(torch.autograd.grad(loss(fast, batch.query_x, batch.query_y), slow))

    return run


# no adaptation ---------------------------------------------------------------------------------------------------


def pooled_last(model: nn.Module) -> nn.Module:
    """The same net with its ReLUs before its pools, as most repositories have them."""
    layers = list(in_one_row(model))
    for i, layer in enumerate(layers[:-1]):
        if isinstance(layer, nn.MaxPool2d) and isinstance(layers[i + 1], nn.ReLU):
            layers[i : i + 2] = layers[i + 1], layer
    return nn.Sequential(*layers)


def supervised(problem: Problem, memory_format: torch.memory_format, pool_last: bool) -> Contender:
    """Forward and backward over all rows of all tasks as one batch of ordinary training."""
    model, tasks = _laid_out(problem, memory_format)
    model = pooled_last(model) if pool_last else model
    x = torch.cat([part for task in tasks for part in task[::2]])  # keeps the format
    y = torch.cat([part for task in tasks for part in task[1::2]])
    return lambda: list(torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters())))


def prototypical(problem: Problem, memory_format: torch.memory_format, pool_last: bool) -> Contender:
    """A training step of a prototypical network: all rows of all tasks through the encoder at once."""
    encoder, tasks = _laid_out(problem, memory_format)
    encoder = pooled_last(encoder) if pool_last else encoder
    x, batch = torch.cat([part for task in tasks for part in task[::2]]), problem.batch
    sizes, ways = [batch.support_x.shape[1], batch.query_x.shape[1]], int(batch.support_y.max()) + 1

    def run():
        support, query = encoder(x).unflatten(0, (len(tasks), -1)).split(sizes, 1)
        losses = contenders.unfused_prototypical_loss(support, batch.support_y, query, batch.query_y, ways)
        return list(torch.autograd.grad(losses.mean(), list(encoder.parameters())))

    return run
