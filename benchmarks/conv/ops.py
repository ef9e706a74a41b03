"""The convolutional ops alone, beside what they stand for: groups `task_conv2d` and `norm_act_pool` of the suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from fastmeta.dispatch.spec import REGISTRY, Make

from ..case import Case
from ..measure import Contender

Forward = Callable[[], Tensor | list[Tensor]]  # of all tasks, or a list of each task's: a loop need not stack


def _forward(run: Forward) -> Contender:
    return torch.no_grad()(lambda: list(run()))


def _backward(run: Forward, leaves: list[Tensor], grad: Tensor) -> Contender:
    def both():
        y = run()
        return list(torch.autograd.grad(y, leaves, grad if isinstance(y, Tensor) else list(grad)))

    return both


def convolutions(make: Make) -> Iterator[Case]:
    """Forward, and with the gradients of weights and bias; of images too, but for the first layer, whose have none.

    Each contender has the images as it likes them, and returns what it has: views of `[T, B, O, H, W]`.
    """
    for workload in REGISTRY["task_conv2d"].workloads(make):
        x, weight, (bias,), *geometry = workload.args
        tasks, channels = x.shape[0], x.shape[4]
        inner = channels > 3
        x, weight, bias = x.requires_grad_(inner), weight.requires_grad_(), bias.requires_grad_()
        planes = x.detach().movedim(-1, 2).requires_grad_(inner)  # [T, B, C, H, W], channels last in memory
        packed = planes.detach().transpose(0, 1).flatten(1, 2).contiguous().requires_grad_(inner)  # [B, T * C, H, W]
        conv2d = partial(F.conv2d, padding=geometry[2])

        def ours(args=workload.args):
            return REGISTRY["task_conv2d"](*args).movedim(-1, 2)

        def loop(planes=planes, weight=weight, bias=bias, conv2d=conv2d):
            return [conv2d(*of_task) for of_task in zip(planes, weight, bias, strict=True)]

        def grouped(packed=packed, weight=weight, bias=bias, conv2d=conv2d, tasks=tasks):
            y = conv2d(packed, weight.flatten(0, 1), bias.flatten(), groups=tasks)
            return y.unflatten(1, (tasks, -1)).transpose(0, 1)

        def mapped(planes=planes, weight=weight, bias=bias, conv2d=conv2d):
            return vmap(conv2d)(planes, weight, bias)

        grad = make.normal(*x.shape[:4], weight.shape[1]).movedim(-1, 2)
        runs = {
            "fastmeta": (ours, x, lambda g: g.movedim(-1, 2)),
            "task loop": (loop, planes, lambda g: g),
            "grouped": (grouped, packed, lambda g, tasks=tasks: g.unflatten(1, (tasks, -1)).transpose(0, 1)),
            "vmap": (mapped, planes, lambda g: g),
        }
        forward = {name: _forward(run) for name, (run, _, _) in runs.items()}
        # no FLOPs: a convolution has forms of fewer multiplications than its definition (Winograd's)
        yield Case(f"task_conv2d fwd {workload.label}", forward, 0, workload.bytes)

        def trained(run, images, view, weights=(weight, bias), grad=grad):
            if not images.requires_grad:
                return _backward(run, list(weights), grad)
            both = _backward(run, [*weights, images], grad)

            def viewed():
                *found, of_images = both()
                return [*found, view(of_images)]

            return viewed

        yield Case(
            f"task_conv2d fwd+bwd {workload.label}",
            {name: trained(*of) for name, of in runs.items()},
            0,
            2 * workload.bytes,
        )


def blocks(make: Make) -> Iterator[Case]:
    """Batch norm, ReLU and pool behind a convolution, forward and backward."""
    for workload in REGISTRY["norm_act_pool"].workloads(make):
        images, (weight,), (bias,), _, norm, groups, eps, *rest = workload.args
        # eighths: no two pixels differ by so little that rounding decides which is the largest
        x = (images * 8).round().div(8).requires_grad_()
        leaves = [x, weight.requires_grad_(), bias.requires_grad_()]

        def ours(x=x, weight=weight, bias=bias, norm=norm, options=(groups, eps, *rest)):
            moments = REGISTRY["norm_moments"](x.detach(), norm, options[0])
            return REGISTRY["norm_act_pool"](x, [weight], [bias], list(moments), norm, *options).movedim(-1, 2)

        def loop(of_task, x=x, weight=weight, bias=bias, eps=eps):
            tasks = zip(x.movedim(-1, 2), weight, bias, strict=True)
            return [of_task(F.batch_norm(p, None, None, w, b, True, eps=eps)) for p, w, b in tasks]

        runs = {
            "fastmeta": ours,
            "task loop, pool before ReLU": partial(loop, lambda z: F.relu(F.max_pool2d(z, 2))),
            "task loop, pool after ReLU": partial(loop, lambda z: F.max_pool2d(F.relu(z), 2)),
        }
        tasks, rows, height, width, channels = x.shape
        grad = make.normal(tasks, rows, height // 2, width // 2, channels).movedim(-1, 2)
        trained = {name: _backward(run, leaves, grad) for name, run in runs.items()}
        yield Case(f"norm_act_pool fwd+bwd {workload.label}", trained, 0, 2 * workload.bytes)
